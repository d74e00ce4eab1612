"""Checkpoints: whole or not there, whatever happens while one is written."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file

from blip3o_core.errors import OutputError, TrainingError
from blip3o_core.lora.files import read_lora
from blip3o_core.train import state as checkpoints
from blip3o_core.train.run import run_training
from blip3o_core.train.state import RunState, list_checkpoints, load_optimizer, load_tensors, save_checkpoint

from ..conftest import command_environment
from ..disks import small_disk

MIB = 2**20


def save(output: Path, step: int, *, keep: int = 10, value: float | None = None, size: int = 4, export=None) -> Path:
    tensors = {"weight": torch.full((size,), float(step if value is None else value))}
    state, optimizer = RunState(step=step, position=step), {"state": {}, "step": step}
    return save_checkpoint(output, state, tensors, optimizer, tensors, keep=keep, export=export)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def steps(output: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in list_checkpoints(output)]


def require_whole(path: Path, step: int, size: int = 4) -> None:
    assert load_tensors(path, {"weight": torch.empty(size)})["weight"].eq(step).all()
    assert load_tensors(path, {"weight": torch.empty(size)}, checkpoints.EMA)["weight"].eq(step).all()
    assert load_optimizer(path)["step"] == step
    assert checkpoints.load_state(path, {}, "").step == step


def test_only_the_newest_are_kept_by_step_not_by_name(tmp_path):
    for step in (8, 9, 10, 99_999_999, 100_000_000):
        save(tmp_path, step, keep=3)
    assert steps(tmp_path) == [10, 99_999_999, 100_000_000]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000010", "step_100000000", "step_99999999"]


def test_an_older_checkpoint_that_is_resumed_gets_a_new_future(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=4)
    save(tmp_path, 2, keep=2, value=7)
    assert steps(tmp_path) == [1, 2]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert load_tensors(tmp_path / "checkpoints" / "step_00000002", {"weight": torch.empty(4)})["weight"].eq(7).all()


def test_a_run_keeps_as_many_as_it_is_told(material, train_config, tmp_path):
    assert run_training(train_config(material.folder, train={"steps": 6, "batch_size": 1}, output={"save_every": 1, "keep": 3})) == 0
    assert steps(tmp_path / "run") == [4, 5, 6]


def fail_in(monkeypatch, place: str) -> None:
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    def half(tensors, file, *rest, **kwargs):
        Path(file).write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def broken_writer(value, file, *rest, **kwargs):
        Path(file).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")

    targets = {"mkdir": (Path, "mkdir", full), "weights": (safetensors.torch, "save_file", half), "state": (Path, "write_text", full),
               "optimizer": (torch, "save", broken_writer), "rename": (os, "replace", full)}  # fmt: skip
    owner, name, function = targets[place]
    monkeypatch.setattr(owner, name, function)


@pytest.mark.parametrize("place", ["mkdir", "weights", "optimizer", "state", "rename", "export"])
@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_failure_anywhere_leaves_the_earlier_ones_as_they_were(place, again, monkeypatch, tmp_path):
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    before = content(tmp_path)

    def export(folder: Path) -> None:
        if place == "export":
            (folder / "half").write_bytes(b"half")
            raise OutputError("the LoRA file can't be written")

    with monkeypatch.context() as patch:
        if place != "export":
            fail_in(patch, place)
        message = "the checkpoint can't be written .*The newest one is .*step_00000002; free some space and go on with output.resume"
        with pytest.raises(OutputError, match=message):
            save(tmp_path, 2 if again else 3, keep=2, value=7, export=export)
    assert content(tmp_path) == before
    require_whole(save(tmp_path, 3, keep=2), 3)
    assert steps(tmp_path) == [2, 3]


def test_an_error_of_the_code_is_not_taken_for_a_full_disk(monkeypatch, tmp_path):
    def export(folder: Path) -> None:
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        save(tmp_path, 1, export=export)
    assert steps(tmp_path) == []


def test_what_killed_saves_left_is_no_checkpoint_and_goes(tmp_path):
    save(tmp_path, 1)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_00000001", folder / ".step_00000002-0123abcd.tmp")
    (folder / "step_00000003").mkdir()
    (folder / "step_00000004_copy").mkdir()
    (folder / "step_00000004_copy" / "state.json").write_text("{}")
    assert steps(tmp_path) == [1]
    assert checkpoints.find_resumable(tmp_path, "latest") == folder / "step_00000001"
    save(tmp_path, 3)
    assert steps(tmp_path) == [1, 3]
    assert not list(folder.glob(".*")) and (folder / "step_00000004_copy").is_dir(), "only leftovers are removed"


def fill_up(folder: Path) -> None:
    """Saves until nothing fits any more; each checkpoint takes 3 MiB."""
    size = MIB // 4
    for step in range(1, 100):
        try:
            save(folder, step, size=size)
        except OutputError as error:
            assert "can't be written" in str(error) and f"step_{step - 1:08}" in str(error)
            break
    else:
        pytest.fail("never full")
    assert steps(folder) == list(range(1, step)) and step > 2
    for path in list_checkpoints(folder):
        require_whole(path, int(path.name.removeprefix("step_")), size)
    assert not list((folder / "checkpoints").glob(".*"))


def test_a_full_disk_ends_the_run_with_a_message_and_whole_checkpoints(tmp_path):
    with small_disk(tmp_path / "disk", 8 * MIB) as folder:
        fill_up(folder)


FILE_LIMIT = """
import resource, signal, sys
from pathlib import Path
import torch
from blip3o_core.errors import OutputError
from blip3o_core.train.state import RunState, list_checkpoints, save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
output = Path(sys.argv[1])
def save(step, size):
    tensors = {"weight": torch.full((size,), float(step))}
    save_checkpoint(output, RunState(step=step), tensors, {"moments": tensors["weight"]}, None, keep=5)
save(1, 1000)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(2, 100_000)
except OutputError as error:
    print(error)
print([path.name for path in list_checkpoints(output)], [path.name for path in (output / "checkpoints").iterdir()])
"""


def test_files_that_may_not_grow_are_the_same_error(tmp_path):
    done = subprocess.run([sys.executable, "-c", FILE_LIMIT, str(tmp_path)], capture_output=True, text=True, timeout=120,
                          env=command_environment())  # fmt: skip
    message, left = done.stdout.splitlines()
    assert "step_00000002: the checkpoint can't be written" in message and "The newest one is" in message, done.stderr
    assert left == "['step_00000001'] ['step_00000001']"


def test_a_run_on_a_full_disk_stops_with_an_output_error_and_can_go_on(material, train_config, monkeypatch, logged, tmp_path):
    config = train_config(material.folder, train={"steps": 6, "batch_size": 1}, output={"save_every": 2})
    saved, original = [], checkpoints.save_checkpoint

    def until_full(*args, **kwargs):
        if len(saved) == 2:
            fail_in(monkeypatch, "optimizer")
        saved.append(original(*args, **kwargs))
        return saved[-1]

    monkeypatch.setattr(checkpoints, "save_checkpoint", until_full)
    with pytest.raises(OutputError, match="step_00000006: the checkpoint can't be written"):
        run_training(config)
    assert steps(tmp_path / "run") == [2, 4]
    monkeypatch.undo()
    assert run_training(replace(config, output=replace(config.output, resume="latest"))) == 0
    assert steps(tmp_path / "run") == [4, 6]
    assert [line["step"] for line in logged(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_of_another_run_is_refused(material, train_config, tmp_path):
    config = train_config(material.folder, train={"steps": 2, "batch_size": 1})
    assert run_training(config) == 0
    with pytest.raises(OutputError, match="holds another run"):
        run_training(config)
    resumed = replace(config, output=replace(config.output, resume="latest"), lora=replace(config.lora, rank=8))
    with pytest.raises(TrainingError, match="lora.rank: 4 -> 8"):
        run_training(resumed)


@pytest.mark.parametrize("file", ["trained.safetensors", "optimizer.pt", "ema.safetensors", "state.json"])
def test_damage_in_a_checkpoint_is_named(file, tmp_path):
    path = save(tmp_path, 1)
    (path / file).write_bytes((path / file).read_bytes()[:20])
    with pytest.raises(TrainingError, match=f"{file}: .*Resume from an older checkpoint in"):
        require_whole(path, 1)


def test_the_moving_average_is_what_is_exported_and_validated(material, train_config, logged, tmp_path):
    def train(name: str, decay: float) -> Path:
        config = train_config(material.folder, train={"steps": 6, "batch_size": 2, "ema_decay": decay}, optimizer={"learning_rate": 1e-2},
                              validation={"every": 6, "samples": 2, "timesteps": 2}, output={"folder": str(tmp_path / name)})  # fmt: skip
        assert run_training(config) == 0
        return tmp_path / name

    plain, averaged = train("plain", 0.0), train("averaged", 0.9)
    newest = averaged / "checkpoints" / "step_00000006"
    weights, shadow = load_file(newest / "trained.safetensors"), load_file(newest / "ema.safetensors")
    unaveraged = load_file(plain / "checkpoints" / "step_00000006" / "trained.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in unaveraged.items())
    for file in (averaged / "blip3o_lora.safetensors", newest / "blip3o_lora.safetensors"):
        exported = read_lora(file).adapters["dit"]
        assert exported
        for layer, adapter in exported.items():
            assert torch.equal(adapter.up, shadow[f"dit.{layer}.lora_B.default.weight"])
            assert not torch.equal(adapter.up, weights[f"dit.{layer}.lora_B.default.weight"])
    losses = [logged(folder, "validation")[-1]["losses"]["text_to_image"] for folder in (plain, averaged)]
    assert losses[0] != losses[1]


def test_the_moving_average_is_that_of_the_formula():
    from blip3o_core.train.ema import MovingAverage

    weight = torch.nn.Parameter(torch.tensor([1.0]))
    average = MovingAverage({"w": weight}, 0.5)
    expected = 1.0
    for step in range(1, 6):
        weight.data.fill_(float(step * step))
        average.update({"w": weight}, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step * step
    assert average.shadow["w"].item() == pytest.approx(expected, rel=1e-6)
