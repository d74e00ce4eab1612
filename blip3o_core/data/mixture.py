"""Which sample of which dataset stands at position n of a run: a function of n alone.

E positions make an epoch. Within one, the datasets take turns in random order, each as often as its share says.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from .seeds import INDEX, ORDER, generator

SMALLEST_SHARE = 1e-6  # an epoch is long enough to draw from every dataset


@dataclass(frozen=True)
class Draw:
    """The number-th draw (0, 1, ...) of this dataset."""

    dataset: int
    number: int


class Mixture:
    """Datasets by weight, samples by random permutations."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], repeats: Sequence[int], seed: int) -> None:
        """Without weights an epoch shows every sample of dataset i repeats[i] times.

        With weights, which all datasets must have then, an epoch has as many positions, shared by weight: the counts differ from
        the exact shares by less than 1. It gets longer if a dataset would not be drawn at all.
        Raises: DataError if only some datasets have a weight, one is empty, or a share is below one in a million.
        """
        assert len(lengths) == len(weights) == len(repeats) > 0
        for index, length in enumerate(lengths):
            if length < 1:
                raise DataError(f"data.{index} holds no samples. Remove it, or check its path.")
        self.lengths = tuple(lengths)
        self.seed = seed
        self.counts = _counts(lengths, weights, repeats)
        """Draws of each dataset in one epoch."""
        self.epoch_length = sum(self.counts)
        self._forget()

    def _forget(self) -> None:
        self._order: tuple[int, np.ndarray] | None = None
        self._ranks: tuple[int, np.ndarray] | None = None
        self._permutations: dict[int, tuple[int, np.ndarray]] = {}

    def __getstate__(self) -> dict:
        """What was computed is computed again in a worker process, rather than sent."""
        return {**self.__dict__, "_order": None, "_ranks": None, "_permutations": {}}

    def locate(self, position: int) -> Draw:
        epoch, place = divmod(position, self.epoch_length)
        if len(self.counts) == 1:
            return Draw(0, position)
        if self._ranks is None or self._ranks[0] != epoch:
            order = self.order(epoch)
            ranks = np.empty(self.epoch_length, np.int32 if self.epoch_length < 2**31 else np.int64)
            for dataset, count in enumerate(self.counts):
                ranks[order == dataset] = np.arange(count, dtype=ranks.dtype)
            self._ranks = epoch, ranks
        dataset = int(self.order(epoch)[place])
        return Draw(dataset, epoch * self.counts[dataset] + int(self._ranks[1][place]))

    def order(self, epoch: int) -> np.ndarray:
        """(epoch_length,) the dataset of each position of an epoch; the last one asked for is kept."""
        if self._order is None or self._order[0] != epoch:
            self._order = None  # frees the memory first
            kind = np.int8 if len(self.counts) < 128 else np.int32
            order = np.repeat(np.arange(len(self.counts), dtype=kind), self.counts)
            if len(self.counts) > 1:
                generator(ORDER, self.seed, epoch).shuffle(order)
            self._order = epoch, order
        return self._order[1]

    def index_of(self, dataset: int, number: int) -> int:
        """The sample of the number-th draw: every pass over a dataset is another permutation of it."""
        pass_number, place = divmod(number, self.lengths[dataset])
        if self._permutations.get(dataset, (None,))[0] != pass_number:
            self._permutations.pop(dataset, None)
            length = self.lengths[dataset]
            permutation = np.arange(length, dtype=np.int32 if length < 2**31 else np.int64)
            generator(INDEX, self.seed, dataset, pass_number).shuffle(permutation)
            self._permutations[dataset] = pass_number, permutation
        return int(self._permutations[dataset][1][place])


def _counts(lengths: Sequence[int], weights: Sequence[float], repeats: Sequence[int]) -> tuple[int, ...]:
    natural = [length * times for length, times in zip(lengths, repeats, strict=True)]
    if not any(weights):
        return tuple(natural)
    for index, weight in enumerate(weights):
        if weight <= 0:
            raise DataError(f"data.{index}.weight is {weight:g}, but other datasets have a weight. Give one to all of them, or to none.")
    shares = np.array(weights, np.float64) / sum(weights)
    if shares.min() < SMALLEST_SHARE:
        raise DataError(f"data.{int(shares.argmin())}.weight is {weights[int(shares.argmin())]:g}, a share below one in a million. "
                        "Raise it, or remove that dataset.")
    total = max(sum(natural), int(np.ceil(1 / shares.min())))
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    largest = np.argsort(counts - exact, kind="stable")[: total - counts.sum()]  # largest remainders first
    counts[largest] += 1
    return tuple(int(count) for count in np.maximum(counts, 1))
