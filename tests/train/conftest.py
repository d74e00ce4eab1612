"""Training in this process and in others, on the tiny checkpoint and on pictures made here."""

import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from blip3o_core.train.config import TrainConfig, print_config
from blip3o_core.train.options import build

from ..conftest import command_environment

REPOSITORY = Path(__file__).parents[2]
TINY = REPOSITORY / "tests" / "data" / "sdxl"
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (40, 80, 220), "yellow": (240, 200, 40)}
DEADLINE_S = 120  # of a process; a machine under load is slow, a hang is for ever


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors gain nothing from threads, and sums of other orders would differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture(colour: tuple[int, int, int], shape: str, kind: str = "PNG") -> bytes:
    image = Image.new("RGB", (80, 64), "white")
    draw = ImageDraw.Draw(image)
    (draw.ellipse if shape == "circle" else draw.rectangle)((20, 15, 50, 45), fill=colour)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


@dataclass(frozen=True)
class Material:
    """The same eight pictures and captions in every form: red circle, red square, green circle, ..."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "pictures"

    @property
    def jsonl(self) -> Path:
        return self.root / "captions.jsonl"

    @property
    def tars(self) -> str:
        return str(self.root / "tars" / "*.tar")

    @property
    def edits(self) -> Path:
        return self.root / "edits.json"

    @property
    def talks(self) -> Path:
        return self.root / "talks.json"

    @property
    def texts(self) -> Path:
        return self.root / "texts.jsonl"

    @property
    def five_tasks(self) -> list[dict[str, str]]:
        """[[data]] of all tasks that LoRA can train."""
        return [{"path": str(self.folder)}, {"path": str(self.folder), "task": "reconstruct"}, {"path": str(self.edits), "task": "edit"},
                {"path": str(self.talks), "task": "understand"}, {"path": str(self.texts), "task": "text"}]  # fmt: skip


def write_material(root: Path, *, broken: bool = False) -> Material:
    """`broken`: among the pictures of the folder and of the first tar is one that is none."""
    made = Material(root)
    made.folder.mkdir(parents=True)
    samples = [(f"{colour}_{shape}", f"a {colour} {shape}", picture(value, shape)) for colour, value in COLOURS.items()
               for shape in ("circle", "square")]  # fmt: skip
    if broken:
        samples.insert(3, ("broken", "a broken picture", b"not a picture"))
    for name, caption, content in samples:
        (made.folder / f"{name}.png").write_bytes(content)
        (made.folder / f"{name}.txt").write_text(caption)
    captions = [{"file_name": f"pictures/{name}.png", "text": caption} for name, caption, _ in samples]
    made.jsonl.write_text("".join(json.dumps(record) + "\n" for record in captions))
    (root / "tars").mkdir()
    for shard in range(2):
        with tarfile.open(root / "tars" / f"{shard}.tar", "w") as tar:
            for name, caption, content in samples[shard::2]:
                for member, value in ((f"{name}.png", content), (f"{name}.txt", caption.encode())):
                    info = tarfile.TarInfo(member)
                    info.size = len(value)
                    tar.addfile(info, io.BytesIO(value))
    made.edits.write_text(json.dumps([
        {"source": f"pictures/{a}_{shape}.png", "instruction": f"make it {b}", "target": f"pictures/{b}_{shape}.png"}
        for a, b in (("red", "green"), ("green", "blue")) for shape in ("circle", "square")
    ]))  # fmt: skip
    made.talks.write_text(json.dumps([
        {"image": f"pictures/{name}.png",
         "conversations": [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": caption}]}
        for name, caption, _ in samples if name != "broken"
    ]))  # fmt: skip
    made.texts.write_text("".join(json.dumps({"prompt": f"say {word}", "response": word}) + "\n" for word in COLOURS))
    return made


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Read-only."""
    return write_material(tmp_path_factory.mktemp("material"))


@pytest.fixture(scope="session")
def broken_material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """The same with a damaged picture. Read-only."""
    return write_material(tmp_path_factory.mktemp("broken"), broken=True)


@pytest.fixture
def own_material(tmp_path: Path) -> Material:
    """One that a test may change."""
    return write_material(tmp_path / "material")


@pytest.fixture
def train_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """train_config(data, train={"steps": 5}, output={...}): a short run on the CPU; `data` is a path or a list of sections."""

    def make(data: Any, **sections: Mapping[str, Any]) -> TrainConfig:
        values: dict[str, Any] = {
            "model": {"path": str(TINY / "checkpoint"), "vision_encoder": str(TINY / "eva_clip_vision_tower")},
            "train": {"steps": 8, "batch_size": 2, "device": "cpu", "precision": "fp32"},
            "lora": {"rank": 4},
            "loader": {"workers": 0},
            "validation": {"every": 0},
            "output": {"folder": str(tmp_path / "run"), "log_every": 1},
            "data": data if isinstance(data, list) else [{"path": str(data)}],
        }
        for name, section in sections.items():
            values[name] = {**values.get(name, {}), **section}
        return build(TrainConfig, values)

    return make


ZYGOTE = """
import json, os, runpy, sys
import torch, accelerate, peft, safetensors.torch, tensorboard, torch.utils.tensorboard, webdataset, transformers
import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl, peft.tuners.lora, torch.nn.parallel.distributed
from diffusers import AutoencoderKL, UNet2DConditionModel
import blip3o_core.train.command, blip3o_core.train.plan
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if "poll" in request:
        print(json.dumps(os.waitpid(request["poll"], os.WNOHANG)), flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(request["environment"])
        status = 70
        try:
            if request["before"]:
                runpy.run_path(request["before"])
            status = blip3o_core.train.command.main(request["words"])
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            import atexit, multiprocessing.util
            sys.stdout.flush(), sys.stderr.flush()
            multiprocessing.util._exit_function()
            os._exit(status)
    print(pid, flush=True)
"""  # starts training processes in a third of a second: everything is imported once, and forked


class Zygote:
    """Starts `python -m blip3o_core.train` many times for the price of its imports."""

    def __init__(self) -> None:
        environment = command_environment() | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen([sys.executable, "-c", ZYGOTE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                         env=environment)  # fmt: skip
        assert self._process.stdout.readline().strip() == "ready"

    def ask(self, **request: Any) -> Any:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


class Job:
    """A training process in a session of its own, as `setsid` makes one: its data workers belong to its group."""

    def __init__(self, zygote: Zygote, words: list[str], log: Path, environment: dict[str, str], before: str = "") -> None:
        self._zygote, self.log = zygote, log
        self._status: int | None = None
        self.pid = zygote.ask(words=words, log=str(log), environment=environment, before=before)

    @property
    def ended(self) -> bool:
        if self._status is None:
            pid, status = self._zygote.ask(poll=self.pid)
            self._status = status if pid else None
        return self._status is not None

    @property
    def err(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def wait(self) -> int:
        """-> exit status, negative for a signal that killed it."""
        end = time.monotonic() + DEADLINE_S
        while not self.ended:
            if time.monotonic() > end:
                self.signal(signal.SIGKILL, group=True)
                pytest.fail(f"still running after {DEADLINE_S} s:\n{self.err}")
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(self._status)

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits while the process runs; fails if it ends first."""
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert not self.ended, f"ended too early with {self.wait()}:\n{self.err}"
            assert time.monotonic() < end, f"never happened:\n{self.err}"
            time.sleep(0.002)

    def signal(self, number: int, *, group: bool = False) -> None:
        (os.killpg if group else os.kill)(self.pid, number)


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    if not hasattr(os, "fork"):
        pytest.skip("these tests start processes by fork, which this system lacks")
    started = Zygote()
    yield started
    started.close()


@pytest.fixture
def start(zygote: Zygote, tmp_path: Path) -> Iterator[Callable[..., list[Job]]]:
    """start(config, *words, processes=1) -> the jobs, one per rank; several find each other as `accelerate launch` arranges it.

    `before` is a script that each process runs first, `environment` is added to theirs.
    """
    jobs: list[Job] = []

    def launch(
        config: TrainConfig, *words: str, processes: int = 1, before: str = "", environment: Mapping[str, str] | None = None
    ) -> list[Job]:  # fmt: skip
        file = tmp_path / f"{len(jobs)}.toml"
        file.write_text(print_config(config), "utf-8")
        started = []
        port = free_port() if processes > 1 else 0
        for rank in range(processes):
            own = dict(environment or {})
            if processes > 1:
                own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1",
                        "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": str(port)}  # fmt: skip
            started.append(Job(zygote, [str(file), *words], tmp_path / f"{len(jobs)}.{rank}.err", own, before))
            jobs.append(started[-1])
        return started

    yield launch
    for job in jobs:
        if not job.ended:
            job.signal(signal.SIGKILL, group=True)
            job.wait()


@pytest.fixture
def finish(start: Callable[..., list[Job]]) -> Callable[..., None]:
    """finish(config, ...): starts a run and waits for its good end."""

    def run(config: TrainConfig, *words: str, processes: int = 1, **options: Any) -> None:
        for job in start(config, *words, processes=processes, **options):
            assert job.wait() == 0, job.err

    return run


@pytest.fixture(scope="session")
def train() -> Callable[..., subprocess.CompletedProcess]:
    """train("run.toml", "train.steps=3"): the real command; ten seconds of imports."""

    def run(*words: object, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "blip3o_core.train", *map(str, words)], capture_output=True, text=True, timeout=DEADLINE_S,
            env=command_environment() | {"OMP_NUM_THREADS": "1", **environment},
        )  # fmt: skip

    return run


@pytest.fixture(scope="session", name="free_port")
def free_port_fixture() -> Callable[[], int]:
    return free_port


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="session")
def logged() -> Callable[[Path, str], list[dict[str, Any]]]:
    """logged(folder, "train"): lines of log.jsonl of one kind, whole ones."""

    def read(folder: Path, kind: str) -> list[dict[str, Any]]:
        file = folder / "log.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [line for line in map(json.loads, lines) if line["kind"] == kind]

    return read


@pytest.fixture(scope="session")
def everything() -> Callable[[Path], dict[str, torch.Tensor]]:
    """everything(folder): all tensors of the newest checkpoint and of the result, by file and name."""

    def read(folder: Path) -> dict[str, torch.Tensor]:
        newest = sorted((folder / "checkpoints").glob("step_*"))[-1]
        tensors = {f"{file.relative_to(folder)}:{name}": value for file in [*newest.glob("*.safetensors"), *folder.glob("*.safetensors")]
                   for name, value in load_file(file).items()}  # fmt: skip
        optimizer = torch.load(newest / "optimizer.pt", weights_only=True)["state"]
        tensors |= {f"optimizer:{number}.{name}": torch.as_tensor(value) for number, state in optimizer.items()
                    for name, value in state.items()}  # fmt: skip
        return tensors

    return read
