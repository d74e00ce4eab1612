"""Checkpoints of a run: everything that the next update depends on, written whole or not at all.

A checkpoint is a folder checkpoints/step_00000200 with trained.safetensors, optimizer.pt, ema.safetensors and state.json. All random
numbers and the order of the data are functions of seed and position, so the position is their whole state.
"""

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OutputError, TrainingError
from .config import differences

FOLDER = "checkpoints"
FORMAT = "blip3o-training-1"
STATE, TRAINED, EMA, OPTIMIZER = "state.json", "trained.safetensors", "ema.safetensors", "optimizer.pt"


@dataclass
class RunState:
    """Attributes: `step`, updates done; `position`, samples drawn by all processes; `broken`, samples that could not be read."""

    step: int = 0
    position: int = 0
    seconds: float = 0.0
    broken: dict[str, str] = field(default_factory=dict)  # name -> reason
    config: dict[str, Any] = field(default_factory=dict)
    base: str = ""  # fingerprint of the checkpoint that is trained
    topology: dict[str, int] = field(default_factory=dict)  # processes, workers: streams are split among them


def checkpoint_folder(output: Path, step: int) -> Path:
    """Of one step."""
    return output / FOLDER / f"step_{step:08d}"


def list_checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints, oldest first. What a killed process left half-written has another name."""
    found = [path for path in (output / FOLDER).glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name) and (path / STATE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def save_checkpoint(
    output: Path, state: RunState, trained: Mapping[str, Tensor], optimizer: Mapping[str, Any], ema: Mapping[str, Tensor] | None, *,
    keep: int, export: Callable[[Path], None] | None = None,
) -> Path:  # fmt: skip
    """Writes into a temporary folder, flushes it to the disk, renames it; then removes all but the `keep` newest.

    Checkpoints of later steps go too: an older one was resumed, and its future is now another.
    `export` may put more files into the folder, for people.
    Raises: OutputError (a full disk); every earlier checkpoint is then still there.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    final = checkpoint_folder(output, state.step)
    temporary = final.with_name(f".{final.name}-{uuid.uuid4().hex[:8]}.tmp")
    replaced = final.with_name(f".{final.name}-replaced.tmp")
    try:
        remove_unfinished(output)
        temporary.mkdir(parents=True)
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in trained.items()}, temporary / TRAINED)
        if ema is not None:
            save_file({name: tensor.cpu().contiguous() for name, tensor in ema.items()}, temporary / EMA)
        torch.save(optimizer, temporary / OPTIMIZER)
        (temporary / STATE).write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1, ensure_ascii=False), "utf-8")
        if export is not None:
            export(temporary)
        for file in temporary.iterdir():
            _flush(file)
        if final.exists():  # the same step again, after a resume with other settings
            os.rename(final, replaced)
        os.replace(temporary, final)
        _flush(final.parent)
    except (OSError, RuntimeError, SafetensorError, OutputError) as error:  # each writer has its own error for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists():
            with contextlib.suppress(OSError):
                os.rename(replaced, final)
        kept = list_checkpoints(output)
        raise OutputError(f"{final}: the checkpoint can't be written ({error}). The newest one is {kept[-1] if kept else 'none'}; free "
                          'some space and go on with output.resume="latest".') from error
    whole = list_checkpoints(output)
    mine = whole.index(final) + 1
    for other in [replaced, *whole[:mine][:-keep], *whole[mine:]]:
        shutil.rmtree(other, ignore_errors=True)
    return final


def remove_unfinished(output: Path) -> None:
    """What killed processes left of checkpoints."""
    for path in (output / FOLDER).glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def find_resumable(output: Path, resume: str) -> Path | None:
    """The checkpoint that `output.resume` names. Raises TrainingError if a named one is not there; "latest" may find none."""
    if resume == "latest":
        found = list_checkpoints(output)
        return found[-1] if found else None
    path = Path(os.path.expanduser(resume))
    if not (path / STATE).is_file():
        raise TrainingError(f"output.resume: {path} is no checkpoint of a run ({STATE} is missing). Use \"latest\", or a folder like "
                            f"{checkpoint_folder(output, 200)}.")
    return path


def load_state(path: Path, config: dict[str, Any], base: str) -> RunState:
    """Raises TrainingError if the checkpoint is of another run: other data, another model, other settings that matter."""
    try:
        values = json.loads((path / STATE).read_text("utf-8"))
        if values.pop("format") != FORMAT:
            raise ValueError("unknown format")
        state = RunState(**values)
        for name, usual in asdict(RunState()).items():
            value, kinds = getattr(state, name), (int, float) if isinstance(usual, float) else (type(usual),)
            if type(value) not in kinds or (isinstance(usual, int | float) and not value >= 0):
                raise ValueError(f"{name} is {value!r:.60}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TrainingError(f"{path / STATE}: damaged ({error}). Resume from an older checkpoint in {path.parent}.") from error
    if state.base != base:
        raise TrainingError(f"{path}: trained from another model (fingerprint {state.base}, model.path has {base}). Give the model it "
                            "was started with, or a new output.folder.")
    changed = differences(state.config, config)
    if changed:
        raise TrainingError(f"{path}: was written by a run with other settings: {'; '.join(changed)}. Set them back, or start anew with "
                            "another output.folder.")
    return state


def load_tensors(path: Path, wanted: Mapping[str, Tensor], file: str = TRAINED) -> dict[str, Tensor]:
    """Raises TrainingError unless names and shapes are those of `wanted`."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path / file)
    except (OSError, SafetensorError) as error:
        raise TrainingError(f"{path / file}: can't be read ({error}). Resume from an older checkpoint in {path.parent}.") from error
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: tensor.shape for name, tensor in wanted.items()}:
        raise TrainingError(f"{path / file}: its {len(tensors)} tensors are not those that this run trains ({len(wanted)}): another rank, "
                            "other targets or other parts. Set them back, or start anew with another output.folder.")
    return tensors


def load_optimizer(path: Path) -> dict[str, Any]:
    """Raises TrainingError. Nothing in the file is executed."""
    try:
        return torch.load(path / OPTIMIZER, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # of damaged bytes torch's reader makes anything: struct.error, KeyError, IndexError, ...
        raise TrainingError(f"{path / OPTIMIZER}: damaged ({error}). Resume from an older checkpoint in {path.parent}.") from error


def _flush(path: Path) -> None:
    with contextlib.suppress(OSError):  # folders can't be opened on Windows
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
