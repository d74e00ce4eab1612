"""What a run reports while it trains: log.jsonl, TensorBoard, the console and, if asked for, Weights & Biases.

log.jsonl holds one JSON object per line; a number that is not finite is null. By `kind`:
run: step it starts at, total_steps, config, resumed, time, wandb_id. train: means over the updates since the line before, but
learning_rate and memory_bytes (peak), which are the newest; seconds is the time since the run began, without pauses between resumes.
validation: losses per task. pictures: file, relative to the folder. event: text, time.
"""

import json
import math
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any, TextIO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..errors import OutputError
from ..files import require_writable, write_text
from ..runtime import require_package

try:
    import resource
except ImportError:  # Windows
    resource: ModuleType | None = None

FILE = "log.jsonl"
GIB = 2**30
NUMBERS = ("loss", "learning_rate", "grad_norm", "samples_per_second", "memory_bytes", "seconds", "total_steps")
LARGEST = 1e30  # of numbers that are read again: curves and sums of them stay finite
SMOOTHING = 0.9  # of the loss on the console: weight of what came before


class RunLog:
    """A context manager; leaving it writes the updates that no line holds yet and closes everything.

    Time spent between a training update and the end of `validation`, `pictures` or `event` does not count in samples_per_second.

    Args:
        folder: of the run; made if missing.
        start_step: updates done before, 0 for a fresh run. config: plain tables, as from `config.as_dict`.
        resumed: keep the log up to start_step (a killed run may have logged further than its checkpoint); else it starts empty.
        wandb: project name, empty for none; WANDB_MODE=offline keeps it on this machine.

    Raises: InputError without the package tensorboard (or wandb), OutputError if the folder can't be written.
    """

    def __init__(
        self, folder: Path, *, total_steps: int, start_step: int, config: dict[str, Any], log_every: int = 10, wandb: str = "",
        resumed: bool,
    ) -> None:  # fmt: skip
        require_package("tensorboard", extra="train", purpose="the log of a training run")
        from torch.utils.tensorboard import SummaryWriter

        require_writable([folder], folder)
        self.folder, self.total_steps, self.start_step, self.log_every = folder, total_steps, start_step, log_every
        kept = [line for line in read_log(folder) if line["step"] <= start_step] if resumed else []
        earlier = [line for line in kept if line["kind"] == "run"]
        wandb_id = (earlier[-1].get("wandb_id") if earlier else None) or (uuid.uuid4().hex[:8] if wandb else None)
        self._wandb = _start_wandb(wandb, folder, config, wandb_id) if wandb else None
        write_text(folder / FILE, "".join(map(_json_line, kept)))  # also ends a half-written line
        self._file = (folder / FILE).open("a", encoding="utf-8", newline="\n")
        # Everything at purge_step or later is hidden; what was logged at the checkpoint's own step stays.
        self._tensorboard = SummaryWriter(log_dir=str(folder / "tensorboard"), purge_step=start_step + 1 if resumed else 0, flush_secs=10)
        self._write(kind="run", step=start_step, total_steps=total_steps, config=config, resumed=resumed, time=_now(), wandb_id=wandb_id)

        self._first_validation = next((line["losses"] for line in kept if line["kind"] == "validation"), None)
        self._seconds_before = max((line.get("seconds") or 0.0 for line in kept if line["kind"] == "train"), default=0.0)
        self._started = self._mark = monotonic()
        self._console = _Console(total_steps, start_step)
        self._window = _Window()
        self._smoothed: float | None = None
        self._closed = False

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(
        self, step: int, *, loss: float, losses: Mapping[str, float], learning_rate: float, grad_norm: float, samples: int,
        memory_bytes: int,
    ) -> None:  # fmt: skip
        """To be called after every update.

        Args:
            step: updates done, this one included. losses: per task, only those that were in the update.
            samples: of all processes, in this update.
        """
        now = monotonic()
        window = self._window
        window.add(step, loss, losses, grad_norm, samples, now - self._mark)
        window.learning_rate, window.memory_bytes = learning_rate, memory_bytes
        self._mark = now
        if math.isfinite(loss):
            self._smoothed = loss if self._smoothed is None else SMOOTHING * self._smoothed + (1 - SMOOTHING) * loss
        self._console.advance(step, self._smoothed, learning_rate, memory_bytes)
        if step % self.log_every == 0 or step == self.total_steps:
            self._write_window()

    def validation(self, step: int, losses: Mapping[str, float]) -> None:
        """losses: per task, on the fixed samples."""
        self._write(kind="validation", step=step, losses=dict(losses))
        self._scalars(step, {f"validation/loss_{task}": loss for task, loss in losses.items()})
        self._first_validation = self._first_validation or dict(losses)
        self._console.line(f"step {step}/{self.total_steps}  validation: "
                           + ", ".join(f"{task} {loss:.4f}{self._change(task, loss)}" for task, loss in losses.items()))
        self._mark = monotonic()

    def pictures(self, step: int, image: Image.Image, file: Path) -> None:
        """A sheet of samples that lies in `file`, inside the folder."""
        self._write(kind="pictures", step=step, file=file.resolve().relative_to(self.folder.resolve()).as_posix())
        self._tensorboard.add_image("samples/0", np.asarray(image.convert("RGB")), step, dataformats="HWC")
        if self._wandb is not None:
            wandb = require_package("wandb", extra="wandb", purpose="output.wandb")
            self._wandb.log({"step": step, "samples/0": wandb.Image(image)})
        self._console.line(f"step {step}/{self.total_steps}  pictures: {file}")
        self._mark = monotonic()

    def event(self, step: int, text: str) -> None:
        """Something worth a line: a checkpoint, a broken sample, a stop."""
        self._write(kind="event", step=step, text=text, time=_now())
        self._console.line(f"step {step}/{self.total_steps}  {text}")
        self._mark = monotonic()

    def close(self) -> None:
        """May be called twice."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._window.updates:
                self._write_window()
        finally:
            self._console.close()
            self._file.close()
            self._tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()

    def _write_window(self) -> None:
        window, self._window = self._window, _Window()
        seconds = self._seconds_before + monotonic() - self._started
        values = window.means()
        self._write(kind="train", step=window.step, **values, seconds=round(seconds, 3))
        scalars = {"loss": values["loss"], **{f"loss_{task}": loss for task, loss in values["losses"].items()}}
        scalars |= {name: values[name] for name in ("learning_rate", "grad_norm", "samples_per_second")}
        self._scalars(window.step, {f"train/{name}": value for name, value in {**scalars, "memory_gib": window.memory_bytes / GIB}.items()})
        self._console.plain_line(window.step, values)

    def _change(self, task: str, loss: float) -> str:
        first = (self._first_validation or {}).get(task)
        return f" ({100 * (loss / first - 1):+.1f} % since the start)" if first and math.isfinite(loss) and loss != first else ""

    def _write(self, **line: Any) -> None:
        try:
            self._file.write(_json_line(line))
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self.folder / FILE}: can't be written ({error.strerror or error}). Make room, then resume.") from error

    def _scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **finite})


class _Window:
    """Sums over the updates since the last line."""

    def __init__(self) -> None:
        self.step = self.updates = self.samples = self.memory_bytes = 0
        self.loss = self.grad_norm = self.seconds = self.learning_rate = 0.0
        self.losses: dict[str, tuple[float, int]] = {}

    def add(self, step: int, loss: float, losses: Mapping[str, float], grad_norm: float, samples: int, seconds: float) -> None:
        self.step = step
        self.updates += 1
        self.loss += loss
        self.grad_norm += grad_norm
        self.samples += samples
        self.seconds += seconds
        for task, value in losses.items():
            total, count = self.losses.get(task, (0.0, 0))
            self.losses[task] = (total + value, count + 1)

    def means(self) -> dict[str, Any]:
        return {
            "loss": self.loss / self.updates,
            "losses": {task: total / count for task, (total, count) in self.losses.items()},
            "learning_rate": self.learning_rate,
            "grad_norm": self.grad_norm / self.updates,
            "samples_per_second": self.samples / self.seconds if self.seconds > 0 else None,
            "memory_bytes": self.memory_bytes,
        }


class _Console:
    """A bar on a terminal; plain lines where stderr goes to a file, as on a cluster."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.total_steps, self.start_step = total_steps, start_step
        self._stream: TextIO = sys.stderr
        self._started = monotonic()
        self._bar: tqdm | None = None
        if self._stream is not None and self._stream.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, desc="training", unit="step", file=self._stream, dynamic_ncols=True)

    def advance(self, step: int, loss: float | None, learning_rate: float, memory_bytes: int) -> None:
        if self._bar is not None:
            text = "none" if loss is None else f"{loss:.4f}"
            self._bar.set_postfix_str(f"loss {text}, lr {learning_rate:.2e}, {memory_bytes / GIB:.1f} GiB", refresh=False)
            self._bar.update(step - self._bar.n)

    def plain_line(self, step: int, values: Mapping[str, Any]) -> None:
        if self._bar is not None:
            return
        left = (monotonic() - self._started) / max(step - self.start_step, 1) * (self.total_steps - step)
        rate = values["samples_per_second"] or 0.0
        self.line(f"step {step}/{self.total_steps}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  {rate:.2f} samples/s  "
                  f"{format_seconds(left)} left  {values['memory_bytes'] / GIB:.1f} GiB")

    def line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._stream is not None:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of log.jsonl; none if there is no file. Lines that a killed process left unfinished, or nobody wrote, are passed over."""
    try:
        raw = (folder / FILE).read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"{folder / FILE}: can't be read ({error.strerror or error}).") from error
    lines = []
    for text in raw.split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
            continue
        if isinstance(line, dict) and _is_sound(line):
            lines.append(line)
    return lines


def _is_sound(line: dict[str, Any]) -> bool:
    """Whether values have the types that this module writes."""
    losses, config = line.get("losses") or {}, line.get("config") or {}
    if not all(isinstance(value, dict) for value in (losses, config)) or type(line.get("step")) is not int:
        return False
    numbers = [line["step"], *(line.get(name) for name in NUMBERS), *losses.values()]
    tables = [table for section in config.values() for table in (section if isinstance(section, list) else [section])]
    return (isinstance(line.get("kind"), str) and all(isinstance(table, dict) for table in tables)
            and all(value is None or (type(value) in (int, float) and abs(value) <= LARGEST) for value in numbers))  # fmt: skip


def peak_memory_bytes(device: torch.device | str) -> int:
    """Most that was allocated: on CUDA by torch on that device, else by the process in main memory (0 on Windows)."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def format_seconds(seconds: float) -> str:
    """h:mm:ss"""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _json_line(line: Mapping[str, Any]) -> str:
    return json.dumps(_finite(line), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _start_wandb(project: str, folder: Path, config: dict[str, Any], run_id: str) -> Any:
    wandb = require_package("wandb", extra="wandb", purpose=f"output.wandb = {project!r}")
    run = wandb.init(project=project, dir=str(folder), name=folder.resolve().name, id=run_id, resume="allow", config=config)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # wandb's own steps can't go back to a checkpoint
    return run
