"""The random numbers of one sample in one step: a function of seed and position alone, so runs can be killed, split and resumed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import ConfigError

BELOW_ONE = 1 - 2**-24  # the largest float32; a sigmoid rounds to 1


@dataclass(frozen=True)
class Draw:
    """What one sample is trained or measured with.

    Attributes: `u` in [0, 1), the fixed noise level of a validation (None: drawn); `training` turns condition dropout on.
    """

    seed: tuple[int | str, ...]
    u: float | None = None
    training: bool = True

    def generator(self) -> torch.Generator:
        """A new one each time, at its start."""
        return torch.Generator("cpu").manual_seed(hashed_seed(*self.seed))


def counted_positions(draws: Sequence[Draw], share: float) -> list[bool]:
    """Which samples have positions that count up through pictures. In a validation none."""
    return [draw.training and torch.rand((), generator=draw.generator()).item() < share for draw in draws]


def repeated(draws: Sequence[Draw], times: int) -> list[Draw]:
    """`times` draws of each sample, one round after the other; the first round is `draws`. A validation is not repeated."""
    rounds = times if all(draw.training for draw in draws) else 1
    return [draw if number == 0 else replace(draw, seed=(*draw.seed, number)) for number in range(rounds) for draw in draws]


def hashed_seed(*parts: int | str) -> int:
    """63 bits from numbers and words, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class FlowDraws:
    """Noise (B, C, H, W), u (B,) in [0, 1) and kept (B,), all float32: kept is 0 where the condition is dropped."""

    noise: Tensor
    u: Tensor
    kept: Tensor


def flow_draws(
    draws: Sequence[Draw], shape: Sequence[int], *, timesteps: str, logit_mean: float = 0.0, logit_std: float = 1.0,
    condition_dropout: float = 0.0,
) -> FlowDraws:  # fmt: skip
    """Draws a batch, sample by sample.

    Args:
        shape: of one sample. timesteps: "uniform", or "logit_normal" (arXiv:2403.03206, sec. 3.1).
    """
    noise, levels, kept = [], [], []
    for draw in draws:
        generator = draw.generator()
        noise.append(torch.randn(tuple(shape), generator=generator))
        u = _level(generator, timesteps, logit_mean, logit_std)
        levels.append(u if draw.u is None else draw.u)
        dropped = torch.rand((), generator=generator).item() < condition_dropout
        kept.append(0.0 if draw.training and dropped else 1.0)
    return FlowDraws(torch.stack(noise), torch.tensor(levels), torch.tensor(kept))


def condition_noise(draws: Sequence[Draw], shape: Sequence[int], most: float) -> Tensor:
    """Noise (B, *shape) for conditions, of a deviation between 0 and `most` that is drawn for each; in a validation zeros."""
    found = []
    for draw in draws:
        generator = torch.Generator("cpu").manual_seed(hashed_seed(*draw.seed, "condition"))
        level = most * torch.rand((), generator=generator) * draw.training
        found.append(level * torch.randn(tuple(shape), generator=generator))
    return torch.stack(found)


def _level(generator: torch.Generator, timesteps: str, mean: float, std: float) -> float:
    if timesteps == "uniform":
        return torch.rand((), generator=generator).item()
    if timesteps == "logit_normal":
        return min(torch.sigmoid(mean + std * torch.randn((), generator=generator)).item(), BELOW_ONE)
    raise ConfigError(f"timesteps {timesteps!r} is unknown. Use uniform or logit_normal.")
