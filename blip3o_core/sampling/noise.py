"""Seeded start noise: one generator per image, so a seed gives the same picture alone, in any batch and on any run."""

from collections.abc import Sequence

import torch

from ..errors import InputError

MAX_SEED = 2**64 - 1


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise (len(seeds), *shape), float32 on the CPU; row i depends on seeds[i] alone.

    The stream is that of ComfyUI's `prepare_noise` for a batch of one, so graphs and headless runs share seeds.
    Raises: InputError if a seed is not an integer in 0..2^64 - 1.
    """
    rows = []
    for seed in seeds:
        require_seed(seed)
        rows.append(torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed)))
    return torch.cat(rows)


def require_seed(seed: int) -> None:
    """Raises InputError if `seed` is not an integer in 0..2^64 - 1."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise InputError(f"seed {seed!r} is not an integer in 0..{MAX_SEED}.")
