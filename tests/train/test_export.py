"""LoRA in and out: which layers get adapters, what the file holds, and that merging it gives the trained model."""

import math
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file

from blip3o_core import Blip3oPipeline
from blip3o_core.errors import ConfigError
from blip3o_core.lora.files import read_lora
from blip3o_core.train.export import base_queries, export_lora
from blip3o_core.train.run import run_training

from .training_samples import DATA, Prepared, prepare, training_config, write_data

BOTH = ('lora.parts=["dit","language_model"]', "lora.latent_queries=true", "lora.rank=4", "lora.alpha=6")
SCALES = {"plain": (), "rslora": ("lora.rslora=true",), "dora": ("lora.dora=true",)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def lora(data: Path, output: Path, *overrides: str) -> Prepared:
    return prepare(training_config(data, output, ["text_to_image"], *overrides))


def disturb(prepared: Prepared) -> None:
    """As if trained for long: all that trains moves."""
    generator = torch.Generator().manual_seed(1)
    for parameter in prepared.model.trained().values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)


def exported(prepared: Prepared, path: Path) -> Path:
    values = {name: parameter.data for name, parameter in prepared.model.trained().items()}
    export_lora(path, prepared.opened.config, prepared.opened.sources, prepared.model, values, step=7)
    return path


def test_default_targets_are_in_every_block(data, tmp_path):
    """The tiny DiT and the tiny language model have 3 blocks each: 10 and 4 layers per block."""
    prepared = lora(data, tmp_path / "out", *BOTH)
    trained = prepared.model.trained()
    dit = [name for name in trained if name.startswith("dit.") and ".lora_A." in name]
    language = [name for name in trained if name.startswith("backbone.language_model.") and ".lora_A." in name]
    assert (len(dit), len(language), len(trained)) == (3 * 10, 3 * 4, 2 * (30 + 12) + 1)
    for block in range(3):
        assert sum(f"layers.{block}." in name for name in dit) == 10 and sum(f"layers.{block}." in name for name in language) == 4


@pytest.mark.parametrize(("key", "what"), [("dit_targets", "diffusion transformer"), ("language_model_targets", "language model")])
def test_unknown_targets(key, what, data, tmp_path):
    with pytest.raises(ConfigError, match=rf"no layer of the {what} is called 'attn9.to_q'. Its layers end in: .*(1.to_q|attn.q_proj)"):
        lora(data, tmp_path / "out", *BOTH, f'lora.{key}=["attn9.to_q"]')


def test_options_reach_peft(data, tmp_path):
    prepared = lora(data, tmp_path / "out", "lora.rank=3", "lora.alpha=12", "lora.dropout=0.25", 'lora.dit_targets=["attn1.to_q"]')
    layers = [module for module in prepared.model.dit.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert len(layers) == 3
    for layer in layers:
        assert (layer.r["default"], layer.scaling["default"], layer.lora_dropout["default"].p) == (3, 4.0, 0.25)
        assert layer.lora_A["default"].weight.shape[0] == 3
    assert all(module.training for module in prepared.model.active) and len(prepared.model.active) == 3
    prepared.model.set_training(False)
    assert not any(module.training for module in prepared.model.active)


@pytest.mark.parametrize("way", SCALES)
def test_adapters_start_as_no_update(way, data, tmp_path, relative_error):
    prepared = lora(data, tmp_path / "out", *BOTH, *SCALES[way])
    plain = Blip3oPipeline.from_pretrained(DATA / "checkpoint", device="cpu", dtype=torch.float32)
    assert relative_error(prepared.model.query_states(prepared.examples), query_states(plain, prepared)) <= 1e-6
    x, timestep, states = inputs(prepared)
    assert relative_error(prepared.model.velocity(x, timestep, states), plain.dit(x, timestep, states)) <= 1e-6


def test_start_values_depend_on_the_seed_alone(data, tmp_path):
    first, again, other = (lora(data, tmp_path / "out", *BOTH, f"train.seed={seed}").model.trained() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if ".lora_A." in name)


@torch.no_grad()
@pytest.mark.parametrize("way", SCALES)
def test_the_merged_file_is_the_trained_model(way, data, tmp_path, relative_error):
    prepared = lora(data, tmp_path / "out", *BOTH, *SCALES[way])
    disturb(prepared)
    path = exported(prepared, tmp_path / "lora.safetensors")
    plain = Blip3oPipeline.from_pretrained(DATA / "checkpoint", device="cpu", dtype=torch.float32)
    merged = Blip3oPipeline.from_pretrained(DATA / "checkpoint", device="cpu", dtype=torch.float32, loras=[(path, 1.0)])
    states = prepared.model.query_states(prepared.examples)
    assert relative_error(query_states(merged, prepared), states) <= 2e-6
    assert relative_error(query_states(plain, prepared), states) > 0.01
    x, timestep, states = inputs(prepared)
    velocity = prepared.model.velocity(x, timestep, states)
    assert relative_error(merged.dit(x, timestep, states), velocity) <= 2e-6
    assert relative_error(plain.dit(x, timestep, states), velocity) > 0.01


def query_states(pipe: Blip3oPipeline, prepared: Prepared) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([pipe.encode_prompt([f"a {colour} square"]) for colour in ("red", "green")])


def inputs(prepared: Prepared) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    config = prepared.model.dit.config
    return (torch.randn(2, config.in_channels, 8, 8, generator=generator), torch.tensor([100.0, 700.0]),
            torch.randn(2, 64, config.context_dim, generator=generator))  # fmt: skip


def test_what_the_file_says(data, tmp_path):
    for way, alpha in (("plain", 6.0), ("rslora", 6 * math.sqrt(4))):
        path = exported(lora(data, tmp_path / "out", *BOTH, *SCALES[way], "lora.trigger=xyz"), tmp_path / f"{way}.safetensors")
        assert [adapter.alpha for adapter in read_lora(path).all_adapters] == pytest.approx([alpha] * (30 + 12))
        metadata = read_lora(path).metadata
        assert (metadata["blip3o.trigger"], metadata["blip3o.training_steps"], metadata["blip3o.rank"]) == ("xyz", "7", "4")
        assert str(DATA) not in metadata["blip3o.config"] and str(data) not in metadata["blip3o.config"]


def test_dora_magnitudes_are_in_the_file(data, tmp_path):
    prepared = lora(data, tmp_path / "out", *BOTH, "lora.dora=true")
    file = read_lora(exported(prepared, tmp_path / "dora.safetensors"))
    weights = Blip3oPipeline.from_pretrained(DATA / "checkpoint", device="cpu", dtype=torch.float32).dit
    for path, adapter in file.adapters["dit"].items():  # at the start: the norms of the rows of the base
        assert torch.allclose(adapter.magnitude, weights.get_submodule(path).weight.norm(dim=1), rtol=1e-6)
    disturb(prepared)
    moved = read_lora(exported(prepared, tmp_path / "moved.safetensors"))
    assert not any(torch.equal(a.magnitude, b.magnitude) for a, b in zip(file.all_adapters, moved.all_adapters, strict=True))


def test_queries_alone(data, tmp_path):
    prepared = lora(data, tmp_path / "out", "lora.parts=[]", "lora.latent_queries=true")
    assert set(prepared.model.trained()) == {"backbone.latent_queries"}
    disturb(prepared)
    file = read_lora(exported(prepared, tmp_path / "queries.safetensors"))
    difference = prepared.model.trained()["backbone.latent_queries"].detach() - base_queries(prepared.opened.sources)
    assert file.adapters == {} and torch.equal(file.queries, difference) and difference.abs().max() > 0


def test_the_average_is_exported(data, tmp_path):
    config = training_config(data, tmp_path / "out", ["text_to_image"], *BOTH, "train.ema_decay=0.5", "train.steps=3", "train.batch_size=2",
                             "validation.every=0", "optimizer.learning_rate=1e-2", "output.name=mine")  # fmt: skip
    assert run_training(config) == 0
    averages, current = (load_file(tmp_path / f"out/checkpoints/step_00000003/{name}.safetensors") for name in ("ema", "trained"))
    file = load_file(tmp_path / "out/mine.safetensors")
    name = "dit.layers.1.attn1.to_q.lora_B.default.weight"
    result = file["diffusion_model.layers.1.attn1.to_q.lora_B.weight"]
    assert torch.equal(result, averages[name]) and not torch.equal(result, current[name])


def test_the_average_is_exported_in_full_training(data, tmp_path):
    config = training_config(data, tmp_path / "out", ["text_to_image"], "train.method=full", 'train.parts=["latent_queries"]',
                             "train.ema_decay=0.5", "train.steps=3", "train.batch_size=2", "validation.every=0",
                             "optimizer.learning_rate=1e-2")  # fmt: skip
    assert run_training(config) == 0
    averages, current = (load_file(tmp_path / f"out/checkpoints/step_00000003/{name}.safetensors") for name in ("ema", "trained"))
    result = Blip3oPipeline.from_pretrained(tmp_path / "out/model", device="cpu", dtype=torch.float32).backbone.latent_queries
    assert torch.equal(result, averages["backbone.latent_queries"]) and not torch.equal(result, current["backbone.latent_queries"])


def test_a_merged_lora_changes_the_fingerprint_of_the_language_side(checkpoint_copy, edit_tensors, data, tmp_path):
    """Cached query states are named after it, and a LoRA of attention leaves every vector as it was."""
    def merge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.q_proj.weight"] += 0.01

    before, eva = (getattr(lora(data, tmp_path / "a").opened.sources, f"{part}_fingerprint") for part in ("language", "eva"))
    edit_tensors(checkpoint_copy / "model.safetensors", merge)
    sources = prepare(training_config(data, tmp_path / "b", ["text_to_image"], checkpoint=checkpoint_copy)).opened.sources
    assert sources.language_fingerprint != before and sources.eva_fingerprint == eva
