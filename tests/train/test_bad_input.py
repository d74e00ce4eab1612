"""What goes wrong on real machines ends in one message that says what and where, or is stepped over; what was saved stays whole."""

import errno
import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_core.cli.main import main as blip3o
from blip3o_core.errors import CheckpointError, ConfigError, DataError, InputError, OutputError, TrainingError
from blip3o_core.train.config import TrainConfig
from blip3o_core.train.run import run_training

from ..disks import small_disk


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files, by name."""
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.rglob("*") if file.is_file()}


def truncate(file: Path, share: float = 0.5) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


# Each spoils its own copy of the material -> arguments of train_config, and what is raised before the first update.


def empty_folder(own):
    (own.root / "none").mkdir()
    return own.root / "none", {}, DataError, "none: holds no pictures"


def missing_folder(own):
    return own.root / "nowhere", {}, DataError, "nowhere: there is no such file or folder"


def no_captions(own):
    own.jsonl.unlink()
    for file in own.folder.glob("*.txt"):
        file.unlink()
    return own.folder, {}, DataError, r"none of 8 pictures has a caption.*beginning with blue_circle\.txt"


def two_pictures_one_caption(own):
    own.jsonl.unlink()
    shutil.copy(own.folder / "red_circle.png", own.folder / "red_circle.jpg")
    return own.folder, {}, DataError, r"red_circle\.jpg and red_circle\.png would share one caption, red_circle\.txt. Rename one"


def duplicate_names(own):
    own.jsonl.write_text(own.jsonl.read_text() + own.jsonl.read_text().splitlines()[0])
    return own.jsonl, {}, DataError, r"red_circle.png' is named in record 1 and again in record 9"


def nothing_readable(own):
    for file in own.folder.glob("*.png"):
        truncate(file)
    return own.folder, {}, DataError, "20 samples in a row can't be used. The last is .*png"


def tar_without_samples(own):
    (own.root / "tars" / "0.tar").write_bytes(b"\0" * 10240)
    (own.root / "tars" / "1.tar").unlink()
    return own.tars, {}, DataError, "no samples in 1 tars. Members are called KEY.jpg"


def task_that_does_not_fit(own):
    return [{"path": str(own.folder), "task": "edit"}], {}, DataError, "holds nothing for the task edit"


def task_that_reaches_nothing(own):
    return [{"path": str(own.talks), "task": "understand"}], {}, ConfigError, "trains only backbone, vision, but this run trains dit"


def no_such_model(own):
    return own.folder, {"model": {"path": str(own.root)}}, CheckpointError, "config.json"


def no_eva_tower(own):
    return own.folder, {"model": {"vision_encoder": ""}}, CheckpointError, "holds no EVA-CLIP tower.*model.vision_encoder"


def no_decoder(own):
    copy = shutil.copytree(Path(__file__).parents[1] / "data" / "sdxl" / "checkpoint", own.root / "bare")
    shutil.rmtree(copy / "diffusion-decoder")
    return own.folder, {"model": {"path": str(copy)}, "samples": {"every": 1, "prompts": ["a"]}}, CheckpointError, "bare.*decoder"


def sample_size(own):
    return own.folder, {"samples": {"every": 1, "prompts": ["a"], "width": 65}}, ConfigError, "samples.width = 65 is not a multiple of"


def sample_picture(own):
    samples = {"every": 1, "prompts": ["a"], "images": [str(own.root / "gone.png")]}
    return own.folder, {"samples": samples}, InputError, "gone.png"


def lora_target(own):
    return own.folder, {"lora": {"dit_targets": ["to_x"]}}, ConfigError, "no layer of the diffusion transformer is called 'to_x'"


def device(own):
    return own.folder, {"train": {"device": "gpu"}}, InputError, "device 'gpu' can't be used here"


def cached_random_crop(own):
    return [{"path": str(own.folder), "crop": "random"}], {"cache": {"enabled": True}}, ConfigError, "data.0.crop is \"random\""


def weight_of_one(own):
    data = [{"path": str(own.folder), "weight": 1.0}, {"path": str(own.tars)}]
    return data, {}, DataError, "data.1.weight is 0, but other datasets have a weight"


def output_is_a_file(own):
    (own.root / "file").write_text("")
    return own.folder, {"output": {"folder": str(own.root / "file")}}, OutputError, "file: can't write there"


def output_below_a_file(own):
    (own.root / "file").write_text("")
    return own.folder, {"output": {"folder": str(own.root / "file" / "run")}}, OutputError, "can't write there"


def resume_from_nothing(own):
    return own.folder, {"output": {"resume": "lastest"}}, TrainingError, 'lastest is no checkpoint of a run.*Use "latest"'


@pytest.mark.parametrize("spoil", [
    empty_folder, missing_folder, no_captions, two_pictures_one_caption, duplicate_names, nothing_readable, tar_without_samples,
    task_that_does_not_fit, task_that_reaches_nothing, no_such_model, no_eva_tower, no_decoder, sample_size, sample_picture, lora_target,
    device, cached_random_crop, weight_of_one, output_is_a_file, output_below_a_file, resume_from_nothing,
])  # fmt: skip
def test_what_can_not_be_trained_is_refused(spoil: Callable, own_material, train_config, tmp_path):
    data, sections, error, message = spoil(own_material)
    with pytest.raises(error, match=message):
        run_training(train_config(data, **sections))
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_the_command_prints_one_line_and_no_traceback(own_material, tmp_path, capsys):
    assert blip3o(["train", f"model.path={tmp_path}", f"data.0.path={own_material.folder}"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("blip3o: ") and err.count("\n") == 1


def broken_of(folder: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (folder / "broken.jsonl").read_text().splitlines()]
    return {Path(line["name"]).name: line["reason"] for line in lines}


def spoil_three(own) -> None:
    own.jsonl.unlink()
    truncate(own.folder / "red_circle.png")
    (own.folder / "blue_circle.png").write_text("<html>")
    (own.folder / "green_square.txt").unlink()


def test_broken_samples_are_named_and_stepped_over(own_material, train_config, tmp_path, logged):
    spoil_three(own_material)
    assert run_training(train_config(own_material.folder, train={"steps": 8}, loader={"max_broken": 3})) == 0
    found = broken_of(tmp_path / "run")
    assert found.keys() == {"red_circle.png", "blue_circle.png", "green_square.png"}
    assert "not a picture" in found["blue_circle.png"] and "no caption green_square.txt" in found["green_square.png"]
    assert logged(tmp_path / "run", "train")[-1]["step"] == 8


def test_one_broken_sample_too_many_ends_the_run_with_its_name(own_material, train_config, tmp_path):
    spoil_three(own_material)
    with pytest.raises(DataError, match=r"3 samples can't be used, more than loader.max_broken = 2.*broken.jsonl.*raise the limit"):
        run_training(train_config(own_material.folder, train={"steps": 8}, loader={"max_broken": 2}))
    assert len(broken_of(tmp_path / "run")) == 3
    assert list((tmp_path / "run" / "checkpoints").glob("step_*")), "what was trained until then is kept"


def test_a_tar_cut_in_the_middle_is_named_and_the_rest_is_used(own_material, train_config, tmp_path, logged):
    truncate(own_material.root / "tars" / "0.tar", 0.4)
    assert run_training(train_config(own_material.tars, train={"steps": 8})) == 0
    assert any("cut off" in reason for reason in broken_of(tmp_path / "run").values())
    assert logged(tmp_path / "run", "train")[-1]["step"] == 8


def test_a_batch_larger_than_the_dataset_repeats_it(material, train_config, tmp_path, logged):
    assert run_training(train_config(material.folder, train={"steps": 1, "batch_size": 11})) == 0
    assert logged(tmp_path / "run", "train")[-1]["loss"] > 0


@pytest.fixture(scope="module")
def trained(material, tmp_path_factory) -> tuple[TrainConfig, Path]:
    """A run of two updates with a checkpoint of each. Read-only."""
    from blip3o_core.train.options import build

    data = Path(__file__).parents[1] / "data" / "sdxl"
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = build(TrainConfig, {
        "model": {"path": str(data / "checkpoint"), "vision_encoder": str(data / "eva_clip_vision_tower")},
        "train": {"steps": 2, "batch_size": 2, "device": "cpu"}, "lora": {"rank": 4}, "loader": {"workers": 0},
        "validation": {"every": 0}, "output": {"folder": str(folder), "save_every": 1, "log_every": 1},
        "data": [{"path": str(material.folder)}],
    })  # fmt: skip
    run_training(config)
    return config, folder


@pytest.fixture
def continued(trained, tmp_path) -> Callable[..., TrainConfig]:
    """continued(section={key: value}): the configuration of a copy of that run, to be resumed for a third update."""
    from dataclasses import replace

    def make(**sections) -> TrainConfig:
        config, folder = trained
        shutil.copytree(folder, tmp_path / "run")
        changes = {"train": {"steps": 3}, "output": {"folder": str(tmp_path / "run"), "resume": "latest"}}
        for name, values in sections.items():
            changes[name] = {**changes.get(name, {}), **values}
        return replace(config, **{name: replace(getattr(config, name), **values) for name, values in changes.items()})

    return make


@pytest.mark.parametrize("file, message", [
    ("trained.safetensors", r"trained\.safetensors: can't be read"), ("optimizer.pt", r"optimizer\.pt: damaged"),
    ("state.json", r"state\.json: damaged"),
])  # fmt: skip
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_damaged_checkpoint_is_named_and_the_older_one_goes_on(file, message, share, continued, tmp_path):
    config = continued()
    checkpoints = tmp_path / "run" / "checkpoints"
    truncate(checkpoints / "step_00000002" / file, share)
    with pytest.raises(TrainingError, match=f"step_00000002.*{message}.*Resume from an older checkpoint in"):
        run_training(config)
    older = continued_from(config, checkpoints / "step_00000001")
    assert run_training(older) == 0


def continued_from(config: TrainConfig, checkpoint: Path) -> TrainConfig:
    from dataclasses import replace

    return replace(config, output=replace(config.output, resume=str(checkpoint)))


def test_another_configuration_is_refused_key_by_key(continued, tmp_path):
    config = continued(lora={"rank": 8}, optimizer={"learning_rate": 5e-4})
    before = contents(tmp_path / "run")
    with pytest.raises(TrainingError, match=r"settings: lora\.rank: 4 -> 8; optimizer\.learning_rate: 0\.0001 -> 0\.0005\. Set them back"):
        run_training(config)
    assert contents(tmp_path / "run") == before


def test_another_base_model_is_refused(continued, checkpoint_copy, edit_tensors, tmp_path):
    edit_tensors(checkpoint_copy / "model.safetensors", lambda tensors: tensors["model.latent_queries"].mul_(2))
    config = continued(model={"path": str(checkpoint_copy)})
    before = contents(tmp_path / "run")
    with pytest.raises(TrainingError, match="trained from another model .*Give the model it was started with"):
        run_training(config)
    assert contents(tmp_path / "run") == before


def test_the_folder_of_another_run_is_not_written_to(continued, tmp_path):
    config = continued(output={"resume": ""})
    before = contents(tmp_path / "run")
    with pytest.raises(OutputError, match=r"holds another run\. Give a new output\.folder, or go on with it: output\.resume=latest"):
        run_training(config)
    assert contents(tmp_path / "run") == before


def test_a_loss_that_is_not_finite_updates_nothing(continued, tmp_path, capsys, monkeypatch):
    """A learning rate of 1e36 makes the adapters infinite in one update; the next one finds out."""
    config = continued(train={"steps": 6}, optimizer={"learning_rate": 1e-4}, output={"save_every": 0})
    kept = contents(tmp_path / "run" / "checkpoints")
    monkeypatch.setattr("blip3o_core.train.loop.learning_rate", lambda *_: 1e36)
    with pytest.raises(TrainingError, match=r"step \d: the loss is (nan|inf) .*nothing was updated.*optimizer\.learning_rate below"):
        run_training(config)
    assert contents(tmp_path / "run" / "checkpoints") == kept


def test_a_lora_of_another_rank_or_base_is_refused_by_generate(trained, tiny_checkpoint, checkpoint_copy, edit_tensors, tmp_path, capsys):
    file = trained[1] / "blip3o_lora.safetensors"
    other = tmp_path / "other.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name or "lora_down" in name)
    save_file({**tensors, name: tensors[name][:2].contiguous()}, other, metadata=metadata_of(file))
    words = ["generate", "a cat", "--width", "64", "--height", "64", "--output", str(tmp_path / "cat.png")]
    assert blip3o([*words, "--model", str(tiny_checkpoint), "--lora", str(other)]) == 1
    assert "other.safetensors" in capsys.readouterr().err
    edit_tensors(checkpoint_copy / "model.safetensors", lambda tensors: tensors["model.latent_queries"].mul_(2))
    assert blip3o([*words, "--model", str(checkpoint_copy), "--lora", str(file)]) == 1
    assert "trained on checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "cat.png").exists()


def metadata_of(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_a_folder_without_permission_is_refused(material, train_config, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere (root)")
    with pytest.raises(OutputError, match="can't write there .*ermission"):
        run_training(train_config(material.folder, output={"folder": str(locked / "run")}))


@pytest.fixture
def megabyte_disk(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_full_disk_keeps_what_was_saved(megabyte_disk, material, train_config):
    config = train_config(material.folder, output={"folder": str(megabyte_disk / "run"), "save_every": 1, "keep": 100}, train={"steps": 50})
    with pytest.raises(OutputError, match=r"the checkpoint can't be written \(.*The newest one is .*step_0.*free some space and go on"):
        run_training(config)
    saved = sorted((megabyte_disk / "run" / "checkpoints").iterdir())
    assert saved and all(path.name.startswith("step_") for path in saved), "no half-written one is left"
    for path in saved:
        assert load_file(path / "trained.safetensors") and torch.load(path / "optimizer.pt", weights_only=True)


def test_a_full_disk_while_caching_says_so(megabyte_disk, own_material, train_config, tmp_path):
    (megabyte_disk / "filler").write_bytes(bytes(2**20 - 4 * 4096))
    with pytest.raises(OutputError, match=os.strerror(errno.ENOSPC)):
        run_training(train_config(own_material.folder, cache={"enabled": True, "folder": str(megabyte_disk / "cache")}))
    assert not list(megabyte_disk.rglob("*.tmp"))


def test_a_killed_data_worker_ends_the_run_which_goes_on_from_there(material, train_config, start, logged, tmp_path):
    config = train_config(material.folder, train={"steps": 100_000}, loader={"workers": 1}, output={"save_every": 0})
    job = start(config)[0]
    job.until(lambda: len(logged(tmp_path / "run", "train")) > 2)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    if not children.exists():
        pytest.skip("the children of a process can't be listed here")
    os.kill(max(map(int, children.read_text().split())), signal.SIGKILL)
    assert job.wait() == 1
    assert "train: a data worker was killed, usually out of memory: lower loader.workers" in job.err and "Traceback" not in job.err
    saved = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))
    step = int(saved[-1].name.removeprefix("step_"))
    resumed = start(config, f"train.steps={step + 2}", "output.resume=latest")[0]
    assert resumed.wait() == 0, resumed.err
    assert logged(tmp_path / "run", "train")[-1]["step"] == step + 2
