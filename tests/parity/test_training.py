"""The published objective against loss and gradients of the original implementation, float32 on CPU."""

import pytest
import torch

from blip3o_core.train.losses import flow_levels, flow_matching
from blip3o_core.variants.blip3o import Blip3oCheckpoint


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Blip3oCheckpoint:
    return Blip3oCheckpoint.open(tiny_checkpoint)


@pytest.fixture(scope="module")
def trained(checkpoint, expected):
    """Loss, backbone and DiT after one backward pass."""
    backbone = checkpoint.load_backbone(dtype=torch.float32)
    dit = checkpoint.load_dit(dtype=torch.float32).requires_grad_(True)
    backbone.latent_queries.requires_grad_(True)
    ids = expected["train.input_ids"][0].tolist()
    prompt = ids[: ids.index(checkpoint.tokenizer.image_start_id) + 1]
    states = backbone([backbone.embed(prompt, device=torch.device("cpu"), dtype=torch.float32)])
    losses = flow_matching(
        lambda x, timestep: dit(x, timestep, states), expected["eva.pooled"], expected["train.noise"], expected["train.u"]
    )
    losses.mean().backward()
    return losses, backbone, dit


def test_noise_level_of_u(expected, expected_text):
    assert flow_levels(expected["train.u"]).item() * 1000 == pytest.approx(expected_text["train"]["timestep"], abs=1e-3)


def test_loss(trained, expected, relative_error):
    assert relative_error(trained[0].mean(), expected["train.loss"].reshape(())) <= 1e-5  # measured 9.5e-8


def test_gradient_of_the_latent_queries(trained, expected, relative_error):
    assert relative_error(trained[1].latent_queries.grad, expected["train.grad.latent_queries"]) <= 1e-4  # 5.6e-7


def test_gradient_of_the_last_layer(trained, expected, relative_error):
    assert relative_error(trained[2].norm_out.linear_2.weight.grad, expected["train.grad.dit.out"]) <= 1e-4  # 1.8e-7


def test_frozen_weights_get_no_gradient(trained):
    assert all(parameter.grad is None for parameter in trained[1].language_model.parameters())
