"""Logits -> one token."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError
from .noise import require_seed

PickToken = Callable[[Tensor], int]
"""logits (vocabulary,) -> token id."""


def token_picker(temperature: float, top_p: float | None, top_k: int | None, seed: int) -> PickToken:
    """Greedy at temperature 0, else sampling with a generator of its own: the same seed gives the same text.

    Args:
        temperature: 0..10. top_p: in (0, 1], keeps the likeliest tokens up to that mass. top_k: keeps so many, at least 1.
    Raises: InputError for values out of range.
    """
    require_seed(seed)
    if not isinstance(temperature, (int, float)) or not 0 <= temperature <= 10:
        raise InputError(f"temperature={temperature!r} is not a number in 0..10; 0 always takes the likeliest token.")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p={top_p!r} is not in 0..1.")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InputError(f"top_k={top_k!r} is not a positive integer.")
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator("cpu").manual_seed(seed)

    def pick(logits: Tensor) -> int:
        probabilities = torch.softmax(logits.float().cpu() / temperature, dim=-1)
        probabilities, order = probabilities.sort(descending=True, stable=True)
        if top_k is not None:
            probabilities = probabilities[:top_k]
        if top_p is not None:  # the token that crosses the mass is kept
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities[before < top_p * probabilities.sum()]
        return int(order[torch.multinomial(probabilities, 1, generator=generator)])

    return pick
