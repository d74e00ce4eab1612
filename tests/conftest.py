"""Fixtures of all tests: the tiny checkpoint in the published layout, and what the original code computed from it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_core import Blip3oPipeline

REPOSITORY = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"


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
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}


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
