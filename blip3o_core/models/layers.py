"""What networks share: attention as an injectable function, sinusoidal timesteps, 2D rotary positions.

B batch, N tokens, H heads, D head dim.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(q (B, H, N, D), k (B, H, L, D), v (B, H, L, D)) -> (B, H, N, D), softmax scale 1 / sqrt(D), no mask."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled-dot-product attention: the default wherever no host injects its own."""
    return F.scaled_dot_product_attention(q, k, v)


def timestep_sinusoid(timestep: Tensor, channels: int) -> Tensor:
    """timestep (B,) in 0..1000 -> (B, channels) float32, cosines first, base 10000, frequency shift 0."""
    half = channels // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timestep.device) * (-math.log(10000.0) / half)
    angles = timestep.float()[:, None] * exponent.exp()  # (B, half)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def rope_2d(height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary angles of a grid, row-major: cos and sin, each (height * width, head_dim / 2) float32.

    Row and column angles are interleaved: angle[2k] = row * g_k, angle[2k + 1] = column * g_k, g_k = 10000^(-4k / head_dim).
    Source: Lumina-Next's 2D table (arXiv:2406.18583) as the reference evaluates it, without interpolation.
    """
    k = torch.arange(head_dim // 4, dtype=torch.float32, device=device)
    frequencies = 1.0 / (10000.0 ** (4.0 * k / head_dim))  # (head_dim / 4,)
    rows = torch.arange(height, dtype=torch.float32, device=device)[:, None] * frequencies
    columns = torch.arange(width, dtype=torch.float32, device=device)[:, None] * frequencies
    angles = torch.stack(
        (rows[:, None].expand(height, width, -1), columns[None].expand(height, width, -1)), dim=-1
    )  # (height, width, head_dim / 4, 2)
    angles = angles.reshape(height * width, head_dim // 2)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates adjacent channel pairs of x (B, N, H, D) by rope, two (N, D / 2); float32 inside, dtype of x outside."""
    cos, sin = (table[:, None] for table in rope)  # (N, 1, D / 2)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, H, D / 2)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
