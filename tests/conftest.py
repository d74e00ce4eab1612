"""Fixtures of all tests: the tiny checkpoint in the published layout, and what the original code computed from it.

No test reaches beyond this machine: offline/sitecustomize.py refuses it, here and in child processes, and the test fails.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_core import Blip3oPipeline
from blip3o_core.cli.main import main

REPOSITORY = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"
OFFLINE = Path(__file__).parent / "offline"
"""A folder on PYTHONPATH that keeps a Python process from the network."""
FIRST_OWN_TOKEN = 414
"""[IMG] in the vocabulary of the tiny checkpoint."""
REQUESTS = pytest.StashKey[Path]()


def pytest_configure(config: pytest.Config) -> None:
    """Guards this process and, by the environment, those that it starts."""
    spec = importlib.util.spec_from_file_location("offline", OFFLINE / "sitecustomize.py")
    offline = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(offline)
    if offline.LOG not in os.environ:  # else Python has done it at its start: these tests run inside of a test
        descriptor, os.environ[offline.LOG] = tempfile.mkstemp(prefix="blip3o-tests-requests-", suffix=".txt")
        os.close(descriptor)
        config.add_cleanup(lambda: Path(os.environ.pop(offline.LOG)).unlink())
        os.environ["PYTHONPATH"] = python_path(os.environ.get("PYTHONPATH"))
        offline.install()
    config.stash[REQUESTS] = Path(os.environ[offline.LOG])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    require_no_requests(item.config)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    result = yield
    require_no_requests(item.config)
    return result


def require_no_requests(config: pytest.Config) -> None:
    if attempts := take_requests(config):
        pytest.fail("something reached for the network:\n" + "\n".join(attempts), pytrace=False)


def take_requests(config: pytest.Config) -> list[str]:
    """What was refused since the last time, in all processes, a line each."""
    attempts = config.stash[REQUESTS].read_text("utf-8").splitlines()
    if attempts:
        os.truncate(config.stash[REQUESTS], 0)
    return attempts


def python_path(*more: str | Path | None) -> str:
    """A PYTHONPATH for child processes, which keeps them from the network."""
    return os.pathsep.join(map(str, filter(None, (OFFLINE, *more))))


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """Read-only; copy it (`checkpoint_copy`) to break it."""
    return DATA / "sdxl" / "checkpoint"


@pytest.fixture(scope="session")
def expected() -> dict[str, torch.Tensor]:
    """Numbers of the original implementation, float32 on CPU."""
    return load_file(DATA / "sdxl" / "expected.safetensors")


@pytest.fixture(scope="session")
def expected_text() -> dict:
    """Prompts, their templated strings and token ids, from the original implementation."""
    return json.loads((DATA / "sdxl" / "expected.json").read_text("utf-8"))


@pytest.fixture(scope="session")
def pipe(tiny_checkpoint: Path) -> Blip3oPipeline:
    return Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="session")
def qwen(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As Qwen2.5-VL-Instruct is published: its own tokens, more rows than tokens, none of BLIP3-o's tensors."""
    folder = tmp_path_factory.mktemp("qwen") / "Qwen2.5-VL"
    folder.mkdir()
    tensors = {}
    for file in sorted(tiny_checkpoint.glob("model*.safetensors")):
        tensors |= {name: tensor for name, tensor in load_file(file).items()
                    if not name.startswith(("model.dit.", "model.latent_queries", "model.gen_vision_tower"))}  # fmt: skip
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        own = tensors[name][:FIRST_OWN_TOKEN]
        tensors[name] = torch.cat((own, torch.full((20, own.shape[1]), 7.0)))
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}), "utf-8")
    return folder


@pytest.fixture(scope="session")
def split_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the tiny checkpoint."""
    output = tmp_path_factory.mktemp("split") / "split"
    assert main(["split", str(tiny_checkpoint), "--output", str(output)]) == 0
    return output


@pytest.fixture
def checkpoint_copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def edit_tensors() -> Callable[[Path, Callable[[dict[str, torch.Tensor]], None]], None]:
    """edit_tensors(file, change): rewrites a safetensors file after `change(tensors)`."""

    def edit(file: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file)

    return edit


@pytest.fixture(scope="session")
def blip3o() -> Callable[..., subprocess.CompletedProcess]:
    """blip3o("generate", "a cat", ...): runs the command in a process of its own."""

    def run(*args: object, cwd: Path | None = None, check: bool = False, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(command(*args), cwd=cwd, env=command_environment() | environment, text=True, capture_output=True,
                              timeout=300, check=check)  # fmt: skip

    return run


def command(*args: object) -> list[str]:
    return [sys.executable, "-m", "blip3o_core.cli.main", *map(str, args)]


def command_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": python_path(REPOSITORY)}


def relative_error(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """max |a - b| / max |b|, the measure of the reference data."""
    assert actual.shape == reference.shape, f"{tuple(actual.shape)} is not {tuple(reference.shape)}"
    return ((actual.double() - reference.double()).abs().max() / reference.double().abs().max()).item()


def psnr(actual: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in 0..1; identical pictures give infinity."""
    error = (actual.double() - reference.double()).square().mean()
    return (-10 * torch.log10(error)).item()


@pytest.fixture(scope="session", name="relative_error")
def relative_error_fixture() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return relative_error


@pytest.fixture(scope="session", name="psnr")
def psnr_fixture() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return psnr
