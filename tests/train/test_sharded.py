"""FSDP 2: two processes that keep half of each weight train, save and resume what one process does with all of it.

accelerate offers FSDP only on accelerators; fsdp_on_the_cpu.py puts gloo and the CPU in their place. All else is real.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from blip3o_core.errors import ConfigError
from blip3o_core.train.export import MODEL_FOLDER
from blip3o_core.train.sharding import require_shardable

STEPS = 6
SHARDED = {"processes": 2, "before": str(Path(__file__).with_name("fsdp_on_the_cpu.py")),
           "environment": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}  # fmt: skip
STEADY = {"learning_rate": 1e-4, "schedule": "constant", "epsilon": 1e-6}
METHODS = {
    "LoRA": {"lora": {"rank": 4}, "train": {"ema_decay": 0.9, "max_grad_norm": 0.5}},
    "LoRA of language model and queries": {"lora": {"rank": 3, "parts": ["dit", "language_model"], "latent_queries": True, "dropout": 0.0}},
    "whole DiT": {"train": {"method": "full", "parts": ["dit"], "gradient_accumulation": 2, "ema_decay": 0.9}},
    "whole DiT, recomputed": {"train": {"method": "full", "parts": ["dit"], "gradient_checkpointing": True}},
    "whole vision tower": {"train": {"method": "full", "parts": ["dit", "vision"]}, "tasks": ["edit", "reconstruct"]},
    "whole language model": {"train": {"method": "full", "parts": ["backbone"]}, "tasks": ["understand", "text"]},
    "whole decoder": {"train": {"method": "full", "parts": ["decoder"]}, "tasks": ["decode"]},
}


@pytest.fixture
def configure(train_config, material, tmp_path):
    """configure(method, folder, batch_size, ...): a run of STEPS updates."""

    def make(method: str, folder: str, batch_size: int, *, steps: int = STEPS, save_every: int = STEPS):
        values = METHODS[method]
        paths = {"edit": material.edits, "understand": material.talks, "text": material.texts}
        data = [{"path": str(paths.get(task, material.folder)), "task": task} for task in values.get("tasks", ["text_to_image"])]
        return train_config(data, optimizer=STEADY, lora=values.get("lora", {}),
                            train={"steps": steps, "batch_size": batch_size, **values.get("train", {})},
                            validation={"every": STEPS // 2, "samples": 3, "timesteps": 1},
                            output={"folder": str(tmp_path / folder), "save_every": save_every, "log_every": 1, "keep": 9})  # fmt: skip

    return make


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys() and one
    return max((one[name].float() - two[name].float()).abs().max().item() for name in one)


@pytest.mark.parametrize("method", [method for method in METHODS if method != "whole decoder"])
def test_sharded_processes_train_the_same_weights_as_one(method, configure, start, finish, everything, logged, tmp_path):
    finish(configure(method, "one", 4))
    jobs = start(configure(method, "two", 2), **SHARDED)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].err
    assert "weights are sharded over 2 processes" in jobs[0].err
    folders = tmp_path / "one", tmp_path / "two"
    one, two = map(everything, folders)
    print(method, largest_difference(one, two))
    assert largest_difference(one, two) <= 1e-5
    for kind in ("train", "validation"):
        for a, b in zip(*(logged(folder, kind) for folder in folders), strict=True):
            assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)
            if kind == "train":
                assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    if "whole" in method:
        models = [{name: tensor for file in (folder / MODEL_FOLDER).rglob("*.safetensors") for name, tensor in load_file(file).items()}
                  for folder in folders]  # fmt: skip
        assert largest_difference(*models) <= 1e-5
    else:
        assert (tmp_path / "two" / "checkpoints" / f"step_{STEPS:08}" / "blip3o_lora.safetensors").is_file()


def test_a_sharded_decoder_learns_as_one(configure, finish, logged, tmp_path):
    """First updates only: its rounding errors grow, without FSDP as well (weights after 6 updates: 4e-4 from one process's, as by DDP)."""
    finish(configure("whole decoder", "one", 4, steps=3))
    finish(configure("whole decoder", "two", 2, steps=3), **SHARDED)
    for a, b in zip(*(logged(tmp_path / folder, "train") for folder in ("one", "two")), strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("method", ["LoRA", "whole DiT"])
def test_a_sharded_checkpoint_is_resumed_sharded_and_whole(method, configure, finish, everything, tmp_path):
    """Sharded, the bits are those of an unbroken run; whole, they differ by the order of sums."""
    half = STEPS // 2
    finish(configure(method, "unbroken", 2, save_every=half), **SHARDED)
    unbroken = everything(tmp_path / "unbroken")
    middle = tmp_path / "unbroken" / "checkpoints" / f"step_{half:08}"
    finish(configure(method, "sharded", 2), f"output.resume={middle}", **SHARDED)
    assert largest_difference(unbroken, everything(tmp_path / "sharded")) == 0

    alone = tmp_path / "for_one"  # a batch belongs to a process: one that trains the same has twice the size
    alone.mkdir()
    for file in middle.iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    state = json.loads((alone / "state.json").read_text())
    state["config"]["train"]["batch_size"] = 4
    (alone / "state.json").write_text(json.dumps(state))
    finish(configure(method, "one", 4), f"output.resume={alone}")
    difference = largest_difference(unbroken, everything(tmp_path / "one"))
    print(method, "resumed by one process", difference)
    assert difference <= 1e-5


def accelerator(kind: str = "FSDP", version: int = 2, precision: str = "bf16", **options) -> SimpleNamespace:
    plugin = SimpleNamespace(fsdp_version=version, **{"activation_checkpointing": False, "cpu_offload": None, **options})
    return SimpleNamespace(distributed_type=kind, mixed_precision=precision, state=SimpleNamespace(fsdp_plugin=plugin))


@pytest.mark.parametrize(("launched", "sections", "said"), [
    ({"kind": "DEEPSPEED"}, {}, "DeepSpeed keeps its own copies"),
    ({"version": 1}, {}, "FSDP version 1"),
    ({"activation_checkpointing": True}, {}, "train.gradient_checkpointing"),
    ({"precision": "fp16"}, {}, "fp16"),
    ({}, {"optimizer": {"name": "prodigy"}}, "optimizer.name is prodigy"),
    ({}, {"lora": {"dora": True}}, "lora.dora"),
    ({}, {"train": {"compile": True}}, "train.compile"),
    ({}, {"samples": {"every": 5, "prompts": ["a cat"]}}, "samples.every"),
])  # fmt: skip
def test_what_a_sharded_run_can_not_do_is_said(launched, sections, said, train_config, material):
    with pytest.raises(ConfigError, match=said):
        require_shardable(accelerator(**launched), train_config(material.folder, **sections))


def test_tasks_that_pass_different_networks_are_refused(train_config, material):
    with pytest.raises(ConfigError, match="the same networks, which edit, reconstruct, text, text_to_image, understand don't"):
        require_shardable(accelerator(), train_config(material.five_tasks))
    require_shardable(accelerator(), train_config(material.five_tasks[:3]))
    with pytest.raises(ConfigError, match="only on samples that all have pictures"):
        require_shardable(accelerator(), train_config(material.five_tasks[:3], train={"method": "full", "parts": ["vision"]}))


def test_without_sharding_nothing_is_refused(train_config, material):
    require_shardable(accelerator(kind="MULTI_GPU", version=1), train_config(material.five_tasks))
