"""The colour map that stands for an embedding."""

import torch

from blip3o_core.preview import principal_component_map


def test_the_strongest_direction_becomes_the_first_channel():
    ramp = torch.linspace(-1, 1, 8).expand(8, 8)  # left to right
    z = torch.randn(48, generator=torch.Generator().manual_seed(0))[:, None, None] * ramp
    colours = principal_component_map(z[None], side=8)
    torch.testing.assert_close(colours[0, 0].abs(), ramp.abs(), atol=1e-5, rtol=0)
    assert colours[0, 1:].abs().max() <= 1, "directions without variance stay in range"


def test_values_stay_in_range_and_shape_is_a_picture():
    z = torch.randn(2, 48, 8, 8, generator=torch.Generator().manual_seed(1)) * 50
    colours = principal_component_map(z)
    assert colours.shape == (2, 3, 256, 256)
    assert colours.abs().max() <= 1


def test_a_small_change_of_the_embedding_is_a_small_change_of_the_picture():
    z = torch.randn(1, 48, 8, 8, generator=torch.Generator().manual_seed(2))
    z *= torch.linspace(1, 4, 8)[:, None]  # separates the directions
    nudged = z + 1e-4 * torch.randn(z.shape, generator=torch.Generator().manual_seed(3))
    assert (principal_component_map(z) - principal_component_map(nudged)).abs().max() < 0.05


def test_an_empty_embedding_is_grey():
    assert not principal_component_map(torch.zeros(1, 48, 8, 8)).any()
