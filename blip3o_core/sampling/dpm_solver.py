"""DPM-Solver++ of order 2 (arXiv:2211.01095, midpoint) for flow models: our default for embeddings, and how SANA decoders sample.

x_sigma = (1 - sigma) * data + sigma * noise; the network predicts the velocity noise - data at an integer timestep. Equal to diffusers'
DPMSolverMultistepScheduler with flow sigmas, lower_order_final and a final sigma of zero.
"""

import torch
from torch import Tensor

from .flow_matching import NUM_TRAIN_TIMESTEPS, OnStep, Velocity, flow_sigmas

FLOW_SHIFT = 3.0  # of SANA 512 px
_ALMOST_NOISE = 0.9999
_HIGHEST = 1 - 1 / NUM_TRAIN_TIMESTEPS  # of an unshifted schedule: the first step is not quite pure noise


def dpm_sigmas(steps: int, shift: float = FLOW_SHIFT) -> Tensor:
    """(steps + 1,) float64, falling to 0. Raises InputError unless 1 <= steps <= 1000 and shift > 0."""
    flow_sigmas(steps, shift)  # raises
    sigma = _HIGHEST * torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return torch.cat((sigma, sigma.new_zeros(1)))


def dpm_timestep(sigma: Tensor) -> Tensor:
    """The integer that the network is told, as float32."""
    return torch.floor(sigma.double() * NUM_TRAIN_TIMESTEPS).float()


def sample_dpm_solver(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """One network call a step; the estimate of the data before is used again.

    Args:
        velocity: takes sigma () float64. x: (B, C, H, W) float32 noise. sigmas: as from `dpm_sigmas` or `flow_sigmas`; a first sigma of
            1, whose signal-to-noise ratio has no logarithm, is taken for 0.9999, as ComfyUI does (or higher, if the second one is).
    """
    sigmas = sigmas.double()
    if sigmas[0] >= 1:
        sigmas = torch.cat((((1 + sigmas[1:2]) / 2).clamp_min(_ALMOST_NOISE), sigmas[1:]))
    log_ratio = torch.log((1 - sigmas) / sigmas)  # half the log of the signal-to-noise ratio; infinite at the end
    previous: Tensor | None = None
    for i in range(len(sigmas) - 1):
        data = x - sigmas[i].float() * velocity(x, sigmas[i])
        if on_step is not None:
            on_step(i + 1, len(sigmas) - 1, data)
        if sigmas[i + 1] == 0:
            return data
        h = log_ratio[i + 1] - log_ratio[i]
        extrapolated = data
        if previous is not None:
            r = (log_ratio[i] - log_ratio[i - 1]) / h
            extrapolated = data + (data - previous) / (2 * r).float()
        previous = data
        x = (sigmas[i + 1] / sigmas[i]).float() * x - ((1 - sigmas[i + 1]) * torch.expm1(-h)).float() * extrapolated
    return x
