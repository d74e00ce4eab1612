"""Precision, recomputation, accumulation and optimisers: each changes memory or speed, and the gradients only as much as it must."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from blip3o_core.errors import ConfigError, InputError
from blip3o_core.train.build import resolve_precision
from blip3o_core.train.config import OptimizerOptions, load_config
from blip3o_core.train.optimizer import build_optimizer
from blip3o_core.train.plan import activation_bytes
from blip3o_core.train.run import run_training

from .training_samples import Prepared, prepare, training_config, write_data

CPU = torch.device("cpu")
# tasks, overrides
LORA_DIT = (["text_to_image"], ('lora.parts=["dit"]',))
LORA_LANGUAGE = (["text_to_image", "text"], ('lora.parts=["language_model"]', "lora.latent_queries=true"))
DRAWING = (["text_to_image"], ("train.method=full", 'train.parts=["dit","latent_queries"]'))
BACKBONE = (["understand"], ("train.method=full", 'train.parts=["backbone","vision"]'))
DECODER = (["decode"], ("train.method=full", 'train.parts=["decoder"]'))
VAE = (["autoencode"], ("train.method=full", 'train.parts=["vae"]'))
CLIP = (["contrast"], ("train.method=full", 'train.parts=["clip"]'))
WAYS = {"dit lora": LORA_DIT, "language lora": LORA_LANGUAGE, "drawing": DRAWING, "backbone": BACKBONE, "decoder": DECODER, "vae": VAE,
        "clip": CLIP}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "data")


@pytest.fixture(scope="module")
def opened(data, tmp_path_factory):
    """opened("vae", "train.gradient_checkpointing=true", precision="bf16"): each once, its adapters moved off their zero start."""
    made: dict[tuple, Prepared] = {}

    def make(name: str, *overrides: str, precision: str = "fp32") -> Prepared:
        key = (name, *overrides, precision)
        if key not in made:
            tasks, own = WAYS[name]
            made[key] = prepare(training_config(data, tmp_path_factory.mktemp("out"), tasks, *own, *overrides), precision)
            move_adapters(made[key].model)
        return made[key]

    return make


def move_adapters(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.trained().items():
        if ".lora_B." in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)


def distance(actual: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """max |a - b| / max |b| over all gradients together."""
    assert actual.keys() == reference.keys()
    difference = max((actual[name].double() - reference[name].double()).abs().max().item() for name in actual)
    return difference / max(value.abs().max().item() for value in reference.values())


@pytest.mark.parametrize("name", WAYS)
def test_recomputation_changes_no_gradient_and_saves_memory(name, opened):
    plain, recomputing = opened(name), opened(name, "train.gradient_checkpointing=true")
    assert distance(recomputing.gradients(), plain.gradients()) <= (5e-6 if name == "decoder" else 1e-6)  # measured: 1.8e-6, else <= 7.6e-7
    kept, before = (activation_bytes(each.model, each.examples, "fp32") for each in (recomputing, plain))
    assert kept < 0.4 * before, (kept, before)  # measured: 0.14 to 0.34


@pytest.mark.parametrize("name", WAYS)
def test_bf16_autocast(name, opened):
    """What trains stays float32, what is frozen is bf16, and the loss is that of float32 to the precision of bf16."""
    exact, low = opened(name), opened(name, precision="bf16")
    low.model.load_state_dict({key: value for key, value in exact.model.state_dict().items() if key in exact.model.trained()}, strict=False)
    assert {parameter.dtype for parameter in low.model.trained().values()} == {torch.float32}
    frozen = {key: parameter.dtype for key, parameter in low.model.named_parameters() if not parameter.requires_grad}
    if name == "backbone":  # loaded with the language model that trains; no text reaches them
        del frozen["backbone.latent_queries"]
    assert set(frozen.values()) <= {torch.bfloat16}
    low.model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = low.losses()
    assert losses.dtype == torch.float32
    losses.mean().backward()
    assert all(parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() for parameter in low.model.trained().values())
    assert losses.detach().mean().item() == pytest.approx(exact.losses().mean().item(), rel=0.005)  # measured: 3e-5 to 1.1e-3


def test_two_halves_are_one_batch(opened):
    prepared = opened("drawing")
    examples = prepared.examples * 2
    draws = [*prepared.draws, *(type(draw)((1, *draw.seed)) for draw in prepared.draws)]
    prepared.model.zero_grad()
    prepared.model(examples, draws).mean().backward()
    whole = {name: parameter.grad.clone() for name, parameter in prepared.model.trained().items()}
    prepared.model.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        (prepared.model(examples[part], draws[part]).mean() / 2).backward()
    assert distance({name: parameter.grad for name, parameter in prepared.model.trained().items()}, whole) <= 1e-6


def test_accumulated_micro_batches_train_as_one_batch(data, tmp_path, everything):
    """In whole runs: the same samples, noise and order, so the same weights to rounding."""
    results = []
    for batch, micro in ((4, 1), (2, 2)):
        config = training_config(data, tmp_path / str(batch), ["text_to_image"], "train.steps=3", f"train.batch_size={batch}",
                                 f"train.gradient_accumulation={micro}", "validation.every=0", "optimizer.epsilon=1e-3")  # fmt: skip
        assert run_training(config) == 0
        results.append({name: value for name, value in everything(tmp_path / str(batch)).items() if ":dit" in name})
    assert distance(*results) <= 1e-5


def test_fp16_needs_an_accelerator(data, tmp_path):
    with pytest.raises(ConfigError, match='"fp16", which needs an accelerator; this run is on the CPU'):
        run_training(training_config(data, tmp_path / "out", ["text_to_image"], "train.precision=fp16"))
    assert resolve_precision("fp16", torch.device("cuda")) == "fp16"
    assert (resolve_precision("auto", CPU), resolve_precision("auto", torch.device("cuda"))) == ("fp32", "bf16")


@pytest.mark.parametrize(("name", "package", "device"), [("prodigy", "prodigyopt", "cpu"), ("adamw8bit", "bitsandbytes", "cuda")])
def test_a_missing_optimiser_names_its_extra(name, package, device, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"{package}[\s\S]*\[{name}\]"):
        build_optimizer(OptimizerOptions(name=name), {"weight": nn.Parameter(torch.ones(2))}, torch.device(device))


def test_adamw8bit_is_not_for_the_cpu():
    with pytest.raises(ConfigError, match="adamw8bit, which needs CUDA; this run is on cpu. Use adamw"):
        build_optimizer(OptimizerOptions(name="adamw8bit"), {"weight": nn.Parameter(torch.ones(2))}, CPU)


def test_prodigy_goes_on_where_it_was(data, tmp_path, everything):
    """Saved and read back without unpickling code; the resumed run is the uninterrupted one."""
    pytest.importorskip("prodigyopt", reason="the extra prodigy is not installed")
    words = ["optimizer.name=prodigy", "optimizer.learning_rate=1", "optimizer.schedule=constant", "validation.every=0",
             "output.save_every=2"]  # fmt: skip
    assert run_training(training_config(data, tmp_path / "whole", ["text_to_image"], *words, "train.steps=4")) == 0
    assert run_training(training_config(data, tmp_path / "parts", ["text_to_image"], *words, "train.steps=2")) == 0
    assert run_training(training_config(data, tmp_path / "parts", ["text_to_image"], *words, "train.steps=4", "output.resume=latest")) == 0
    whole, parts = everything(tmp_path / "whole"), everything(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_optimiser_options_arrive():
    options = load_config(None, ["optimizer.learning_rate=0.5", "optimizer.beta1=0.8", "optimizer.beta2=0.95", "optimizer.epsilon=1e-6",
                                 "optimizer.weight_decay=0.1"]).optimizer  # fmt: skip
    group = build_optimizer(options, {"weight": nn.Parameter(torch.ones(2))}, CPU).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.5, (0.8, 0.95), 1e-6, 0.1)
