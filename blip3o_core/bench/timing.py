"""Medians of rounds in which all variants take turns, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Measurement:
    """One variant of a stage. `items` are pictures, prompts or tokens per run; `ratio` is the speed per item next to the plain variant."""

    stage: str
    variant: str
    batch: int
    seconds: float  # median of `runs`
    runs: tuple[float, ...]
    items: int
    unit: str
    steps: int | None = None
    ratio: float | None = None
    error: float | None = None  # relative, of a sampled embedding, against a solution of many steps
    nbytes: int | None = None  # read, when loading


def alternating(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int, device: torch.device,
    on_round: Callable[[int, int], None] | None = None,
) -> dict[str, tuple[float, ...]]:  # fmt: skip
    """Seconds of every round of each variant, warm-up left out."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(warmup + rounds):
        for name, run in variants.items():
            synchronize(device)
            began = time.perf_counter()
            run()
            synchronize(device)
            if number >= warmup:
                seconds[name].append(time.perf_counter() - began)
        if on_round is not None:
            on_round(number + 1, warmup + rounds)
    return {name: tuple(values) for name, values in seconds.items()}


def compared(
    stage: str, seconds: Mapping[str, tuple[float, ...]], *, batch: int, unit: str, items: Mapping[str, int] | int = 1,
    plain: str | None = None, **more: Mapping[str, object],
) -> list[Measurement]:  # fmt: skip
    """Measurements of one comparison. more: further fields, by variant. plain: the variant that the others are compared with."""
    count = {name: items if isinstance(items, int) else items[name] for name in seconds}
    per_item = {name: statistics.median(runs) / count[name] for name, runs in seconds.items()}
    return [
        Measurement(stage, name, batch, statistics.median(runs), runs, count[name], unit,
                    ratio=None if plain is None else per_item[plain] / per_item[name],
                    **{field: values.get(name) for field, values in more.items()})
        for name, runs in seconds.items()
    ]  # fmt: skip


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
