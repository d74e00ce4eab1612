"""The losses of the published objectives, one value per sample, float32. Tensors in, tensors out."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..sampling.flow_matching import NUM_TRAIN_TIMESTEPS


def flow_levels(u: Tensor, shift: float = 1.0) -> Tensor:
    """u (B,) in [0, 1) -> sigma (B,) in (0, 1]: t = 1000 - floor(1000 u), sigma = t / 1000, shifted. Source: the released code."""
    timestep = NUM_TRAIN_TIMESTEPS - torch.floor(u.float() * NUM_TRAIN_TIMESTEPS)
    sigma = timestep / NUM_TRAIN_TIMESTEPS
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_matching(
    velocity: Callable[[Tensor, Tensor], Tensor], data: Tensor, noise: Tensor, u: Tensor, *, shift: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Squared error of the velocity noise - data at one noise level per sample, averaged over each sample's elements -> (B,).

    Args:
        velocity: (x (B, C, H, W) float32, timestep (B,) in 0..1000) -> (B, C, H, W).
        data, noise: (B, C, H, W) float32. u: (B,) in [0, 1).
        weight: (B, H * W) of the tokens, None for 1.
    """
    sigma = flow_levels(u, shift)
    level = sigma[:, None, None, None]
    x = (1 - level) * data + level * noise
    error = velocity(x, sigma * NUM_TRAIN_TIMESTEPS).float() - (noise - data)
    return _token_mean(error.square().mean(dim=1).flatten(1), weight)


def embedding_regression(predicted: Tensor, data: Tensor, weight: Tensor | None = None) -> Tensor:
    """Squared error of embeddings (B, H * W, C), averaged over each sample's elements -> (B,).

    data: (B, C, H, W) float32; weight: (B, H * W) of the tokens, None for 1.
    """
    return _token_mean((predicted.float() - data.flatten(2).transpose(1, 2)).square().mean(dim=2), weight)


def _token_mean(errors: Tensor, weight: Tensor | None) -> Tensor:
    """(B, N) -> (B,)"""
    return (errors if weight is None else errors * weight).mean(dim=1)


def answer_cross_entropy(logits: Tensor, ids: Tensor, counts: list[int]) -> Tensor:
    """Mean cross-entropy over the learned tokens of each sample -> (B,).

    Args:
        logits: (sum of counts, vocabulary), sample after sample. ids: (sum of counts,) the right tokens.
        counts: learned tokens of each sample, all positive.
    """
    losses = F.cross_entropy(logits.float(), ids, reduction="none")
    return torch.stack([own.mean() for own in losses.split(counts)])
