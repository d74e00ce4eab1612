"""Noise levels of the second stage: Stable Diffusion's discrete schedule with leading spacing.

Headless decoding leaves them to diffusers' EulerDiscreteScheduler; a host that brings its own sampler takes them from here.
Source: the scheduler configuration of Emu2's visual decoder.
"""

import torch
from torch import Tensor

from ..errors import InputError

NUM_TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012
STEPS_OFFSET = 1


def signal_rates() -> Tensor:
    """Share of the signal's variance at timesteps 0..999 (1000,) float32: the cumulative product of 1 - beta."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, NUM_TRAIN_TIMESTEPS, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def leading_sigmas(steps: int) -> Tensor:
    """(steps + 1,) float32, falling to 0; for 50 steps from 13.120416 (timestep 981) to 0.041314 (timestep 1).

    Raises: InputError unless 1 <= steps <= 999.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < NUM_TRAIN_TIMESTEPS:
        raise InputError(f"steps={steps!r} is not an integer in 1..{NUM_TRAIN_TIMESTEPS - 1}.")
    rates = signal_rates()
    table = ((1 - rates) / rates) ** 0.5
    timesteps = torch.arange(steps - 1, -1, -1) * (NUM_TRAIN_TIMESTEPS // steps) + STEPS_OFFSET
    return torch.cat((table[timesteps], table.new_zeros(1)))
