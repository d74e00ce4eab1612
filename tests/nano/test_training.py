"""`blip3o train-nano`: the whole way in a few steps, twice the same, and on from where it was stopped."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip3o_core import Blip3oPipeline
from blip3o_core.checkpoint.shards import open_shards, read_tensor
from blip3o_core.cli.main import main
from blip3o_core.nano.training import COUNTS, RECIPES, STAGES, TENSORS, stage_config

from ..conftest import command, command_environment

pytest.importorskip("accelerate", reason="train-nano needs the extra train")

QUICK = ("--steps", 2, "--samples", 80, "--workers", 2, "--device", "cpu")
LARGEST_MB = 32


def train_nano(folder: Path, *more: object) -> subprocess.Popen:
    return subprocess.Popen(command("train-nano", "--output", folder, *QUICK, *more), env=command_environment(), stderr=subprocess.PIPE,
                            text=True, start_new_session=True)  # fmt: skip


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
    while not (tmp_path / "3-decoder" / "log.jsonl").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # and the stage that it has started
    process.wait()
    finished(train_nano(tmp_path))
    one, two = weights(trained / "model"), weights(tmp_path / "model")
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_signal_reaches_the_stages_and_the_same_command_goes_on(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "nano")
    shutil.rmtree(tmp_path / "nano" / "6-dit")
    process = train_nano(tmp_path / "nano", "--steps", 1000)  # too many to finish
    log = tmp_path / "nano" / "6-dit" / "log.jsonl"
    while not (log.exists() and '"train"' in log.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert list((tmp_path / "nano" / "6-dit" / "checkpoints").iterdir()), "it has saved"


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
    for stage in STAGES:
        assert f"| {stage} |" in card


def test_every_stage_changes_what_its_recipe_says_and_nothing_else(trained):
    for stage in STAGES:
        before, after = (open_shards(trained / stage / folder, "model") for folder in ("start", "model"))
        changed = {name for name in before if not torch.equal(read_tensor(before[name]), read_tensor(after[name]))}
        prefixes = tuple(prefix for part in stage_config(trained, stage).train.parts for prefix in TENSORS.get(part, ()))
        assert bool(changed) == bool(prefixes)
        assert all(name.startswith(prefixes) for name in changed)


def test_the_result_holds_what_the_last_stage_of_each_part_has_trained(trained):
    model = open_shards(trained / "model", "model")
    last = {part: stage for stage in STAGES for part in stage_config(trained, stage).train.parts}
    assert last["backbone"] == last["latent_queries"] == "5-backbone" and last["dit"] == "6-dit"
    for part, stage in last.items():
        own = open_shards(trained / stage / "model", "model")
        for name in (name for name in model if name.startswith(TENSORS.get(part, ()))):
            assert torch.equal(read_tensor(model[name]), read_tensor(own[name])), name
    assert last["decoder"] == "3-decoder"
    for part, stage in (("unet", last["decoder"]), ("vae", last["vae"])):
        one, two = (load_file(next((folder / "diffusion-decoder" / part).glob("*.safetensors")))
                    for folder in (trained / "model", trained / stage / "model"))  # fmt: skip
        assert all(torch.equal(one[name], two[name]) for name in one)
    factors = [json.loads((trained / name / "diffusion-decoder/vae/config.json").read_text())["scaling_factor"]
               for name in ("skeleton", "2-vae/model", "model")]  # fmt: skip
    assert factors[1] == factors[2] != factors[0]


def test_stages_stand_in_an_order_in_which_each_finds_what_it_needs():
    names = list(STAGES)
    assert names == sorted(file.stem for file in RECIPES.glob("*.toml"))
    for stage, needs in STAGES.items():
        assert all(names.index(need) < names.index(stage) for need in needs)
        for data in stage_config(Path("x"), stage).data:
            assert Path(data.path).parts[2].removesuffix(".jsonl") in COUNTS


def test_numbers_that_make_no_sense(tmp_path, capsys):
    assert main(["train-nano", "--output", str(tmp_path), "--jobs", "0"]) == 1
    assert capsys.readouterr().err == "blip3o: jobs=0: give at least 1.\n"
    assert not list(tmp_path.iterdir())
