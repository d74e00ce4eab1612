"""Two processes with half of the batch each train what one process trains with the whole batch."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip3o_core.data.loading import TrainingData, batches
from blip3o_core.data.mixture import Mixture
from blip3o_core.data.open import open_dataset
from blip3o_core.train.export import MODEL_FOLDER

STEPS = 10


@pytest.fixture
def both(finish, train_config, tmp_path):
    """both(data, ...): folders of a run of one process with batches of 4 and of two processes with batches of 2."""

    def run(data, *, train=None, **sections) -> tuple[Path, Path]:
        folders = tmp_path / "one", tmp_path / "two"
        for processes, folder in enumerate(folders, 1):
            config = train_config(data, train={"steps": STEPS, "batch_size": 4 // processes, **(train or {})},
                                  validation={"every": STEPS, "samples": 3, "timesteps": 2},
                                  cache={"enabled": sections.pop("cached", False), "folder": str(tmp_path / "cache")},
                                  output={"folder": str(folder), "save_every": STEPS, "log_every": 1}, **sections)  # fmt: skip
            finish(config, processes=processes)
        return folders

    return run


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step_{STEPS:08}" / "trained.safetensors")


def largest_difference(folders: tuple[Path, Path]) -> float:
    one, two = map(trained, folders)
    assert one.keys() == two.keys()
    return max((one[name] - two[name]).abs().max().item() for name in one)


def require_same_losses(folders: tuple[Path, Path], logged, relative: float) -> None:
    for kind in ("train", "validation"):
        lines = [logged(folder, kind) for folder in folders]
        for one, two in zip(*lines, strict=True):
            assert one["losses"] == pytest.approx(two["losses"], rel=relative)


@pytest.mark.parametrize("form", ["folder", "tars"])
def test_two_processes_train_the_same_adapters_as_one(form, broken_material, both, logged):
    """Noise belongs to a position, so equal losses at each step also mean that each position's sample was seen, once.

    Tars are read in lanes, so that two processes see another order; only what is broken is the same then.
    """
    folders = both(getattr(broken_material, form), optimizer={"learning_rate": 1e-4, "schedule": "constant"}, lora={"rank": 4},
                   train={"ema_decay": 0.9})  # fmt: skip
    if form == "folder":
        difference = largest_difference(folders)
        print("LoRA", difference)
        # Absolute, not relative: B starts at 0 and Adam divides each gradient by its own size, so where a gradient is nearly 0 its
        # rounding decides the direction of a whole step of the learning rate.
        assert difference <= 1e-5
        require_same_losses(folders, logged, 1e-5)
    names = [{json.loads(line)["name"] for line in (folder / "broken.jsonl").read_text().splitlines()} for folder in folders]
    assert names[0] == names[1] and len(names[0]) == 1


def test_two_processes_train_the_same_whole_transformer_as_one(material, both, logged):
    folders = both(material.folder, train={"method": "full", "parts": ["dit"]}, optimizer={"learning_rate": 1e-4, "epsilon": 1e-6},
                   cached=True)  # fmt: skip
    one, two = map(trained, folders)
    relative = max(((one[name] - two[name]).abs().max() / one[name].abs().max()).item() for name in one)
    print("DiT, relative to the largest weight", relative)
    assert relative <= 1e-5
    assert largest_difference(folders) > 0 or os.cpu_count() == 1, "the same bits: was anything split?"
    require_same_losses(folders, logged, 1e-5)
    assert all((folder / MODEL_FOLDER / "config.json").is_file() for folder in folders)


def test_tasks_that_a_process_does_not_meet_do_not_stop_the_others(material, both, logged):
    folders = both(material.five_tasks, lora={"rank": 4, "parts": ["dit", "language_model"], "latent_queries": True},
                   optimizer={"learning_rate": 1e-4, "schedule": "constant"})  # fmt: skip
    assert len(trained(folders[0])) > 10
    print("multitask LoRA", largest_difference(folders))
    require_same_losses(folders, logged, 1e-3)


@pytest.mark.parametrize("form", ["folder", "jsonl", "tars"])
@pytest.mark.parametrize("workers", [0, 1])
def test_two_ranks_together_see_every_sample_once_per_epoch(form, workers, material):
    seen = []
    for rank in range(2):
        dataset = open_dataset(str(getattr(material, form)), format="auto", task="text_to_image", shuffle_buffer=3)
        data = TrainingData([dataset], Mixture([8], [0], [1], 0), name_of, batch_size=2, rank=rank, world=2, workers=workers)
        stream = batches(data, 0)
        seen.append([item for _ in range(6) for item in next(stream)])
        stream.close()
    assert sorted(item.position for items in seen for item in items) == list(range(24))
    for epoch in range(3):
        names = Counter(item.example for items in seen for item in items if item.position // 8 == epoch)
        assert len(names) == 8 and set(names.values()) == {1}


def name_of(sample, position: int) -> str:
    return sample.text
