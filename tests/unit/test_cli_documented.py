"""Every command that README and docs show in a block is run, in the order of the page, on nano in place of the models it names.

What would take long is shortened by options at the end, which change how much is done and not what. docs/training.md has its own test
(test_training_docs.py), for its commands are for GPUs and clusters.
"""

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from blip3o_core.cli.main import main
from blip3o_core.shapes.world import Object, Scene, render
from blip3o_core.variants.blip3o import NANO_FOLDER

from ..conftest import DATA, REPOSITORY
from .hub_server import Hub, serving

PAGES = [REPOSITORY / "README.md", *sorted(page for page in (REPOSITORY / "docs").glob("*.md") if page.stem != "training")]
QUICK_TRAINING = ["train.steps=2", "optimizer.warmup_steps=0", "train.device=cpu", "samples.every=0", "validation.every=0"]
SHORTER = {
    "bench": ["--stage", "encode", "--rounds", "1", "--warmup", "0", "--batch", "1"],
    "evaluate": ["--per-category", "1", "--seeds", "1"],
    "download": ["--yes", "--dir", "downloaded"],
    "train": QUICK_TRAINING,
}
"""Subcommand -> what is put behind it."""
ELSEWHERE = ("pip ", "pytest")
"""Run by `.ci/run`, or by the test run itself."""
SCENE = Scene((Object("circle", "red", "large", (0.25, 0.28)), Object("square", "blue", "large", (0.75, 0.72))), "white")


def blocks(page: Path) -> list[list[str]]:
    """Commands of the page's bash blocks, as words."""
    found = re.findall(r"^( *)```bash\n(.*?)^ *```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line.strip() for _, block in found for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line and not line.startswith(("#", *ELSEWHERE))]


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the commands name."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "BLIP3o-Model-4B").symlink_to(NANO_FOLDER)
    (folder / "ComfyUI" / "models").mkdir(parents=True)
    (folder / "SigLIP2_SANA").symlink_to(DATA / "sana" / "checkpoint")
    (folder / "blip3o_core").symlink_to(REPOSITORY / "blip3o_core")
    picture = render(SCENE)
    for name in ("photo.jpg", "street.jpg", "receipt.png"):
        picture.save(folder / name)
    for name in ("fox", "pictures"):
        (folder / name).mkdir()
        for index in range(2):
            picture.save(folder / name / f"{index}.png")
    for index in range(2):
        (folder / "fox" / f"{index}.txt").write_text("a red circle and a blue square\n")
    (folder / "prompts.txt").write_text("a red circle\n")
    shutil.copy(DATA / "nano" / "hearts.safetensors", folder / "style.safetensors")
    return folder


@pytest.fixture(scope="module")
def hub(tiny_checkpoint: Path) -> Iterator[Hub]:
    files = {str(file.relative_to(tiny_checkpoint)): file.read_bytes() for file in tiny_checkpoint.rglob("*") if file.is_file()}
    with serving(Hub({"BLIP3o/BLIP3o-Model-4B": files})) as hub:
        yield hub


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page: Path, sandbox: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(sandbox)
    monkeypatch.setenv("BLIP3O_MODEL", "nano")
    if page.stem == "heart_lora":
        subprocess.run([sys.executable, "-m", "blip3o_core.shapes.hearts", "hearts", "others"], check=True, timeout=300)
    for words in blocks(page):
        assert run(words, hub, monkeypatch) == 0, f"{shlex.join(words)}: {capsys.readouterr().err[-2000:]}"


def run(words: list[str], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit status."""
    words = words[: words.index(">")] if ">" in words else words
    if words[:2] == ["python", "-m"]:
        assert words[2] == "blip3o_core.train"
        words = ["blip3o", "train", *words[3:]]
    assert words[0] == "blip3o", words
    words = [*words[1:], *SHORTER.get(words[1], [])]
    if words[0] == "chat":
        monkeypatch.setattr(sys, "stdin", io.StringIO("What can you draw?\n"))
    if words[0] == "download":  # huggingface_hub reads its settings when it is imported
        environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(Path("hf").absolute())}
        return subprocess.run([sys.executable, "-m", "blip3o_core.cli.main", *words], env=environment, timeout=300).returncode
    return main(words)


def test_the_blocks_are_found() -> None:
    commands = {words[1] for page in PAGES for words in blocks(page) if words[0] == "blip3o"}
    assert {"generate", "edit", "ask", "chat", "caption", "train", "download", "doctor", "lora", "evaluate"} <= commands
    assert shutil.which("blip3o"), "the command is installed"
    assert Image.open(REPOSITORY / "docs" / "screenshots" / "app.jpg").size[0] > 1000
