"""`blip3o train-nano`: the whole way in a few steps, twice the same, and on from where it was stopped."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip3o_core import Blip3oPipeline
from blip3o_core.checkpoint.shards import open_shards
from blip3o_core.nano.training import COUNTS, stage_config, stages

from ..conftest import command, command_environment

pytest.importorskip("accelerate", reason="train-nano needs the extra train")

QUICK = ("--steps", 2, "--samples", 80, "--workers", 2, "--device", "cpu")
LARGEST_MB = 32


def train_nano(folder: Path, *more: object) -> subprocess.Popen:
    return subprocess.Popen(command("train-nano", "--output", folder, *QUICK, *more), env=command_environment(), stderr=subprocess.PIPE,
                            text=True)  # fmt: skip


def finished(process: subprocess.Popen) -> None:
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file.relative_to(folder)}:{name}": tensor for file in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(file).items()}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    finished(train_nano(folder))
    return folder


@pytest.mark.timeout(1800)
def test_a_run_that_was_killed_and_goes_on_gives_the_weights_of_an_unbroken_one(trained, tmp_path):
    process = train_nano(tmp_path)
    while not (tmp_path / stages()[2].stem / "log.jsonl").exists():  # the third stage has begun
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished(train_nano(tmp_path))
    one, two = weights(trained / "model"), weights(tmp_path / "model")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_the_packed_checkpoint_is_whole_and_small(trained):
    model = trained / "model"
    files = [file for file in model.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files if file.suffix == ".safetensors") <= LARGEST_MB * 10**6
    assert {file.name for file in model.glob("*.safetensors")} == {"model.safetensors"}
    pipe = Blip3oPipeline.from_pretrained(model, device="cpu")
    [picture] = pipe.generate(["a red circle"], steps=1, decoder_steps=1)
    assert picture.size == (128, 128), "the checkpoint's own size"
    assert isinstance(pipe.ask("What is it?", images=[picture], max_new_tokens=2), str)
    assert pipe.reconstruct([picture], steps=1)[0].size == (128, 128)
    card = (model / "README.md").read_text()
    for recipe in stages():
        assert f"| {recipe.stem} |" in card


def test_every_stage_changes_what_its_recipe_says_and_nothing_else(trained):
    before = trained / "skeleton"
    for recipe in stages():
        after = trained / recipe.stem / "model"
        parts = stage_config(recipe, trained, before).train.parts
        changed = {name for name, entry in open_shards(after, "model").items() if differs(entry, open_shards(before, "model")[name])}
        prefixes = {"clip": "model.gen_vision_tower.", "backbone": ("model.layers.", "model.embed_tokens.", "model.norm."),
                    "vision": "visual.", "dit": "model.dit.", "latent_queries": "model.latent_queries"}  # fmt: skip
        allowed = tuple(prefix for part in parts for prefix in ([prefixes[part]] if isinstance(prefixes.get(part), str)
                                                                else prefixes.get(part, ())))  # fmt: skip
        assert all(name.startswith(allowed) for name in changed)
        assert bool(changed) == bool(set(parts) & prefixes.keys())
        before = after


def differs(one, other) -> bool:
    from blip3o_core.checkpoint.shards import read_tensor

    return not torch.equal(read_tensor(one), read_tensor(other))


def test_data_and_recipes_name_the_same_tasks():
    needed = {Path(data.path).parts[1].removesuffix(".jsonl") for recipe in stages()
              for data in stage_config(recipe, Path("x"), Path("m")).data}  # fmt: skip
    assert {name.removesuffix(".jsonl") for name in needed} <= {"data", *COUNTS}
