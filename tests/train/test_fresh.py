"""Training from scratch: start values that depend on the seed alone, for every part."""

import pytest
import torch

from blip3o_core.train.fresh import start_afresh
from blip3o_core.variants.blip3o import Blip3oCheckpoint
from blip3o_core.variants.eva_clip import EvaClipCheckpoint
from blip3o_core.variants.sdxl_decoder import SdxlDecoderCheckpoint


@pytest.fixture
def tower_folder(tiny_checkpoint):
    return tiny_checkpoint.parent / "eva_clip_vision_tower"


def load(part: str, tiny_checkpoint, tower):
    if part == "clip":
        return EvaClipCheckpoint.open(tower).load(dtype=torch.float32)
    if part in ("decoder", "vae"):
        decoder = SdxlDecoderCheckpoint.open(tiny_checkpoint)
        network = decoder.empty_unet() if part == "decoder" else decoder.empty_vae()
        return network.to_empty(device="cpu")
    checkpoint = Blip3oCheckpoint.open(tiny_checkpoint)
    loaders = {"dit": checkpoint.load_dit, "backbone": checkpoint.load_backbone, "vision": checkpoint.load_vision_tower}
    return loaders[part](dtype=torch.float32)


@pytest.mark.parametrize("part", ["dit", "backbone", "vision", "clip", "decoder", "vae"])
def test_every_parameter_gets_a_start_value_that_depends_on_the_seed_alone(part, tiny_checkpoint, tower_folder):
    networks = [load(part, tiny_checkpoint, tower_folder) for _ in range(3)]
    for network, seed in zip(networks, (0, 0, 1), strict=True):
        for parameter in network.parameters():
            parameter.data.fill_(float("nan"))
        torch.rand(3)  # the global generator has no say
        start_afresh(network, part, seed)
    first, same, other = (dict(network.named_parameters()) for network in networks)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(torch.isfinite(parameter).all() for parameter in first.values())
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_dit_starts_as_the_released_code_starts_it(tiny_checkpoint, tower_folder):
    """Gates 0, norms 1, linear layers uniform within 1 / sqrt(inputs)."""
    dit = load("dit", tiny_checkpoint, tower_folder)
    start_afresh(dit, "dit", 0)
    layer = dit.layers[0]
    assert (layer.gate == 0).all() and (layer.norm2.weight == 1).all() and (layer.attn1.norm_q.bias == 0).all()
    bound = layer.feed_forward.linear_1.in_features ** -0.5
    weight = layer.feed_forward.linear_1.weight
    assert weight.abs().max() <= bound and weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
