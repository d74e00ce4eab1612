"""The dry run: its numbers are those of a real run, and it leaves no file behind."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from blip3o_core.data.cache import FeatureCache
from blip3o_core.errors import DataError
from blip3o_core.train.build import build_model, parameters_by_part
from blip3o_core.train.command import main
from blip3o_core.train.config import print_config
from blip3o_core.train.frozen import FrozenNetworks, Sources
from blip3o_core.train.plan import MIB, activation_bytes, plan
from blip3o_core.train.run import run_training

TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
           "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3")  # fmt: skip


def number(text: str, label: str) -> float:
    """The last number of the line that begins with `label`."""
    line = re.search(rf"^{re.escape(label)}.*$", text, re.MULTILINE)
    assert line, f"{label!r} is not in\n{text}"
    return float(re.findall(r"[\d,.]*\d", line.group())[-1].replace(",", ""))


def test_the_plan_counts_what_a_run_would_do_and_writes_nothing(material, train_config, tmp_path, capsys):
    config = train_config([{"path": str(material.folder)}, {"path": str(material.edits), "task": "edit", "repeats": 3}],
                          train={"steps": 30, "batch_size": 2, "gradient_accumulation": 2}, cache={"enabled": True})  # fmt: skip
    file = tmp_path / "run.toml"
    file.write_text(print_config(config))
    before = sorted(tmp_path.rglob("*"))
    assert main([str(file), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert re.search(r"pictures\S* +text_to_image +8 +40\.0%", text) and re.search(r"edits\.json +edit +4 +60\.0%", text)
    assert number(text, "an epoch") == 20
    assert "30 steps of 4 samples (batch_size 2 x gradient_accumulation 2), so every sample is seen 6.0 times" in text
    shapes = {name: entry.shape for name, entry in Sources.open(config.model).checkpoint.components["dit"].items()}
    adapted = [shape for name, shape in shapes.items() if name.endswith(tuple(f"{target}.weight" for target in TARGETS))]
    trained = sum(4 * (shape[0] + shape[1]) for shape in adapted)  # rank 4
    total = trained + sum(torch.Size(shape).numel() for shape in shapes.values())
    assert f"{trained:,}" in text and f"{total:,}" in text
    assert number(text, "gradients") == pytest.approx(4 * trained / MIB, abs=0.06)
    assert number(text, "optimizer") == pytest.approx(8 * trained / MIB, abs=0.06)


def test_trained_parameters_are_those_of_the_checkpoint_that_a_run_writes(material, train_config, tmp_path, everything):
    config = train_config([{"path": str(material.folder)}, {"path": str(material.texts), "task": "text"}], train={"steps": 1},
                          lora={"parts": ["dit", "language_model"], "rank": 2, "latent_queries": True})  # fmt: skip
    text = plan(config)
    run_training(config)
    trained = {"dit": 0, "backbone": 0}
    for name, tensor in everything(tmp_path / "run").items():
        if ":" in name and "trained.safetensors" in name:
            trained[name.partition(":")[2].partition(".")[0]] += tensor.numel()
    for part, count in trained.items():
        assert re.search(rf"^{part} +{count:,} ", text, re.MULTILINE), f"{part} trains {count:,}:\n{text}"


@pytest.mark.parametrize("flip, dropout", [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_disk_for_caches_is_what_a_run_takes(flip, dropout, material, train_config, tmp_path):
    """Byte by byte: file systems add their own."""
    config = train_config([{"path": str(material.folder), "flip": flip, "caption_dropout": dropout}], cache={"enabled": True},
                          train={"steps": 1})  # fmt: skip
    text = plan(config)
    run_training(config)
    stored = {folder.name.partition("-")[0]: FeatureCache(folder).bytes_stored() for folder in (tmp_path / "run" / "cache").iterdir()}
    assert number(text, "embeddings") == pytest.approx(stored["eva"] / MIB, abs=6e-4)
    assert number(text, "query states") == pytest.approx(stored["states"] / MIB, abs=6e-4)


class TwoLayers(nn.Module):
    """What `activation_bytes` needs of a model; keeps its input and the output of its ReLU."""

    frozen = type("Nothing", (), {"loaded": ()})()
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(100, 300), nn.Linear(300, 1)

    def forward(self, examples, draws):
        return self.second(self.first(torch.ones(len(examples), 100)).relu())


def test_activations_are_counted_as_by_hand():
    """Per sample 100 inputs, 300 outputs of the ReLU (what it was made from is freed), 1 output; 4 bytes each. Weights don't count."""
    assert activation_bytes(TwoLayers(), [None] * 8, "fp32") == 8 * 4 * (100 + 300 + 1)


def test_activations_grow_with_the_batch_and_shrink_by_recomputation(material, train_config):
    def measured(batch_size: int, checkpointing: bool) -> float:
        config = train_config(material.folder, train={"batch_size": batch_size, "gradient_checkpointing": checkpointing})
        return number(plan(config), f"activations of {batch_size} samples")

    one, four, recomputed = measured(1, False), measured(4, False), measured(4, True)
    assert four == pytest.approx(4 * one, rel=0.15)
    assert recomputed < 0.3 * four


def test_a_large_batch_is_told_from_a_part_of_it(material, train_config, monkeypatch):
    def measured(batch_size: int) -> float:
        return number(plan(train_config(material.folder, train={"batch_size": batch_size})), f"activations of {batch_size} samples")

    part = measured(40)
    monkeypatch.setattr("blip3o_core.train.plan.MEASURED_EXAMPLES", 40)
    assert part == pytest.approx(measured(40), rel=0.05)
    monkeypatch.undo()
    assert measured(1_000_000) > 20_000 * part, "and a million pictures are not read"


def test_the_plan_fails_as_the_run_would(own_material, train_config):
    for file in own_material.folder.glob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="pictures: none of the first samples can be read. Check the files."):
        own_material.jsonl.unlink()
        plan(train_config(own_material.folder))


def test_every_network_is_listed(material, train_config):
    config = train_config(material.five_tasks, lora={"parts": ["dit", "language_model"]})
    sources = Sources.open(config.model)
    frozen = FrozenNetworks(sources, device=torch.device("cpu"), dtype=torch.float32)
    tasks = [data.task for data in config.data]
    table = parameters_by_part(build_model(config, sources, frozen, tasks, precision="fp32"))
    text = plan(config)
    for name, (trained, total) in table.items():
        assert re.search(rf"^{name} +{trained:,} +{total:,}$", text, re.MULTILINE)
    assert Path(config.model.path).name in text
