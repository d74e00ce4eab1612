"""Flow matching from noise (sigma 1) to data (sigma 0): x_sigma = (1 - sigma) * data + sigma * noise.

The network predicts the velocity noise - data = dx / dsigma, at timestep 1000 * sigma. Source: the released BLIP3-o code;
rectified flow, arXiv:2209.03003, sec. 2. Everything here is float32, whatever the dtype of the network.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError

NUM_TRAIN_TIMESTEPS = 1000
MAX_STEPS = 1000
TRUNCATION_SLACK = 2.5e-4  # 1000 * sigma in float32 is at most 1.2e-4 off; integers must not fall to the one below

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (B, C, H, W) float32, sigma () float32 in (0, 1]) -> velocity, same shape, guidance already applied."""

OnStep = Callable[[int, int, Tensor], None]
"""(steps done, steps in all, estimate of the result): progress and previews; raise in it to cancel."""


def flow_sigmas(steps: int, shift: float = 1.0, strength: float = 1.0, schedule: str = "linear") -> Tensor:
    """(steps + 1,) float32, falling to 0.

    Args:
        shift: above 1 spends more steps near the noise.
        strength: 1 starts from pure noise; below, the schedule is the end of a longer one (as ComfyUI's `denoise`), for a
            start between data and noise.
        schedule: "linear" as the reference; "cosine" is dense at both ends, where the network's estimate of the data turns fastest:
            sigma = (1 - cos(pi * u)) / 2, and starts at sigma = strength.
    Raises: InputError unless 1 <= steps <= 1000, shift > 0, 0 < strength <= 1 and the schedule is one of SCHEDULES.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps={steps!r} is not an integer in 1..{MAX_STEPS}.")
    if not 0 < shift < float("inf"):
        raise InputError(f"shift={shift!r} is not a positive number; the published models use 1.0.")
    if not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise InputError(f"strength={strength!r} is not in 0..1; 1 keeps nothing of the start.")
    if schedule not in SCHEDULES:
        raise InputError(f"schedule {schedule!r} is unknown. Use one of {', '.join(SCHEDULES)}.")
    if schedule == "cosine":
        start = math.acos(1 - 2 * strength)
        sigma = (1 - torch.cos(start * torch.arange(steps, 0, -1, dtype=torch.float64) / steps)) / 2
    else:
        total = int(steps / strength)
        sigma = torch.arange(total, 0, -1, dtype=torch.float64)[-steps:] / total
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    return torch.cat((sigma, sigma.new_zeros(1))).float()


def truncate_timestep(timestep: Tensor) -> Tensor:
    """timestep in 0..1000 -> the integer that the reference feeds its network, as float32."""
    return torch.floor(timestep.float() + TRUNCATION_SLACK)


def sample_euler(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """First order, one network call a step: the sampler of the reference."""
    for i in range(len(sigmas) - 1):
        v = velocity(x, sigmas[i])
        _report(on_step, i, sigmas, x, v)
        x = x + (sigmas[i + 1] - sigmas[i]) * v
    return x


def sample_heun(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Second order, two network calls a step but one in the last, where sigma 0 needs none."""
    for i in range(len(sigmas) - 1):
        h = sigmas[i + 1] - sigmas[i]
        v = velocity(x, sigmas[i])
        _report(on_step, i, sigmas, x, v)
        euler = x + h * v
        x = euler if sigmas[i + 1] == 0 else x + h * (v + velocity(euler, sigmas[i + 1])) / 2
    return x


def sample_ab2(velocity: Velocity, x: Tensor, sigmas: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Adams-Bashforth of order two for uneven steps: one network call a step, the previous velocity is reused."""
    previous: tuple[Tensor, Tensor] | None = None
    for i in range(len(sigmas) - 1):
        h = sigmas[i + 1] - sigmas[i]
        v = velocity(x, sigmas[i])
        _report(on_step, i, sigmas, x, v)
        slope = v if previous is None else v + h / (2 * previous[1]) * (v - previous[0])
        previous = (v, h)
        x = x + h * slope
    return x


SCHEDULES = ("linear", "cosine")


def require_guidance_interval(interval: tuple[float, float]) -> None:
    """Raises InputError unless 0 <= low < high <= 1."""
    low, high = interval
    if not 0 <= low < high <= 1:
        raise InputError(f"guidance_interval={low!r}, {high!r} is not two sigmas in 0..1, the lower one first.")


def _report(on_step: OnStep | None, index: int, sigmas: Tensor, x: Tensor, velocity: Tensor) -> None:
    if on_step is not None:
        on_step(index + 1, len(sigmas) - 1, x - sigmas[index] * velocity)
