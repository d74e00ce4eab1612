"""From positions of a run to prepared examples, in this process or in workers.

Micro-batch m of a run takes positions [m G, (m + 1) G) with G = batch_size * world, and process `rank` the rank-th part of them.
Tars can't be read in any order. They are read by lanes: with W workers (at least 1), micro-batch m of a rank belongs to lane
rank * W + m % W, and DataLoader gives every W-th micro-batch to the same worker, so that each lane is read by one process.
"""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import Blip3oError, DataError, InputError
from .broken import BrokenSample
from .mixture import Mixture
from .open import IndexedDataset, StreamDataset
from .sample import Sample
from .seeds import REPLACEMENT, generator

MAX_REPLACEMENTS = 20  # tries at one position of an indexed dataset
MAX_SKIPPED = 1000  # broken samples in a row of a stream; a shard may be bad as a whole
PREFETCH = 2  # micro-batches per worker
GRACE_S = 60  # a worker outlives a SIGTERM by this: the update in progress may need its samples
_COUNTED_POSITIONS = 1 << 22  # at a time

Broken = tuple[tuple[str, str], ...]
Prepare = Callable[[Sample, int], Any]


@dataclass(frozen=True)
class Item:
    """The example at a position, and (name, reason) of the samples that were stepped over to find it."""

    position: int
    example: Any
    broken: Broken = ()


@dataclass
class _Lane:
    next_position: int
    drawn: np.ndarray  # draws of each dataset before the first position: so many good samples are skipped
    streams: dict[int, Iterator[Sample | BrokenSample]] = field(default_factory=dict)


class TrainingData(Dataset):
    """A map from positions to Items. Any position may be asked for; with tars, one that doesn't follow the last is slow."""

    def __init__(
        self, datasets: list[IndexedDataset | StreamDataset], mixture: Mixture, prepare: Prepare | Sequence[Prepare], *,
        batch_size: int, rank: int = 0, world: int = 1, workers: int = 0, known_broken: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        """
        Args:
            prepare: (sample, position) -> example, the same for the same arguments; or one such function per dataset. It raises
                BrokenSample or InputError for a sample that can't be used, and another is taken. With workers, it is pickled where
                processes are not forked.
            known_broken: names that prepare has refused in the run that is resumed: skipping to its position decodes nothing.
        """
        self.datasets = list(datasets)
        self.mixture = mixture
        self.prepares = list(prepare) if isinstance(prepare, Sequence) else [prepare] * len(self.datasets)
        assert len(self.prepares) == len(self.datasets) == len(mixture.lengths)
        self.batch_size = batch_size
        self.rank = rank
        self.world = world
        self.workers = workers
        self._refused = set(known_broken)
        self._has_streams = any(hasattr(dataset, "stream") for dataset in self.datasets)
        self._lanes: dict[int, _Lane] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_lanes": {}}

    def __getitem__(self, position: int) -> Item:
        """Raises DataError if no usable sample is found."""
        draw = self.mixture.locate(position)
        dataset = self.datasets[draw.dataset]
        lane = None
        if self._has_streams:
            lane = self._lane(position)
            lane.next_position = self._following(position)
        if not hasattr(dataset, "stream"):
            return self._indexed(dataset, draw.dataset, draw.number, position)
        if draw.dataset not in lane.streams:
            lane.streams[draw.dataset] = stream = _endless(dataset, self._lane_number(position), self.world * max(self.workers, 1))
            for _ in range(int(lane.drawn[draw.dataset])):
                self._next(dataset.name, stream)
        broken: list[tuple[str, str]] = []
        prepare = partial(self._prepared, draw.dataset, position)
        example = self._next(dataset.name, lane.streams[draw.dataset], prepare, broken)
        return Item(position, example, tuple(broken))

    def _prepared(self, dataset: int, position: int, sample: Sample) -> Any:
        """Raises BrokenSample with the name of the sample."""
        try:
            return self.prepares[dataset](sample, position)
        except BrokenSample as error:
            raise BrokenSample(sample.name, error.reason) from error
        except InputError as error:
            raise BrokenSample(sample.name, str(error)) from error

    def _indexed(self, dataset: IndexedDataset, number: int, draw: int, position: int) -> Item:
        broken: list[tuple[str, str]] = []
        index = self.mixture.index_of(number, draw)
        for attempt in range(MAX_REPLACEMENTS):
            if attempt:
                index = int(generator(REPLACEMENT, self.mixture.seed, position, attempt).integers(len(dataset)))
            try:
                example = self._prepared(number, position, dataset.sample(index))
            except BrokenSample as error:
                broken.append((error.name, error.reason))
                continue
            return Item(position, example, tuple(dict(broken).items()))  # one and the same may have been tried twice
        raise DataError(f"{dataset.name}: {MAX_REPLACEMENTS} samples in a row can't be used. The last is {broken[-1][0]}: {broken[-1][1]}")

    def _next(
        self, name: str, stream: Iterator[Sample | BrokenSample], prepare: Callable[[Sample], Any] | None = None,
        broken: list[tuple[str, str]] | None = None,
    ) -> Any:  # fmt: skip
        """The example from the next sample that is not broken; without `prepare`, that sample was used before and is skipped."""
        for item in itertools.islice(stream, MAX_SKIPPED):
            if prepare is None:
                if isinstance(item, Sample) and item.name not in self._refused:
                    return None
                continue
            if isinstance(item, BrokenSample):
                broken.append((item.name, item.reason))
                continue
            try:
                return prepare(item)
            except BrokenSample as error:
                self._refused.add(error.name)
                broken.append((error.name, error.reason))
        last = f" The last is {broken[-1][0]}: {broken[-1][1]}" if broken else ""
        raise DataError(f"{name}: {MAX_SKIPPED} samples in a row can't be used.{last}")

    def positions(self, start: int) -> Iterator[list[int]]:
        """This rank's positions of each micro-batch from `start` on, which begins one."""
        group = self.batch_size * self.world
        assert start % group == 0, f"position {start} is inside of a micro-batch of {group}"
        for first in itertools.count(start + self.rank * self.batch_size, group):
            yield list(range(first, first + self.batch_size))

    def _lane_number(self, position: int) -> int:
        batch, place = divmod(position, self.batch_size * self.world)
        lanes = max(self.workers, 1)
        return place // self.batch_size * lanes + batch % lanes

    def _following(self, position: int) -> int:
        """The next position of the same lane."""
        if (position + 1) % self.batch_size:
            return position + 1
        return position + 1 + self.batch_size * (self.world * max(self.workers, 1) - 1)

    def _lane(self, position: int) -> _Lane:
        number = self._lane_number(position)
        lane = self._lanes.get(number)
        if lane is None or lane.next_position != position:
            lane = self._lanes[number] = _Lane(position, self._drawn_before(position))
        return lane

    def _drawn_before(self, position: int) -> np.ndarray:
        """Draws of each dataset by the lane of this position, before it."""
        lanes = max(self.workers, 1)
        group = self.batch_size * self.world
        batch, place = divmod(position, group)
        inside = place // self.batch_size * self.batch_size + np.arange(self.batch_size)  # the rank's places in a micro-batch
        drawn = np.zeros(len(self.datasets), np.int64)
        epoch_length = self.mixture.epoch_length
        start = 0
        while start < position:
            epoch = start // epoch_length
            stop = min(position, (epoch + 1) * epoch_length, start + _COUNTED_POSITIONS)
            first = start // group
            batches = np.arange(first + (batch - first) % lanes, (stop - 1) // group + 1, lanes)
            places = (batches[:, None] * group + inside).ravel()
            places = places[(places >= start) & (places < stop)]
            drawn += np.bincount(self.mixture.order(epoch)[places - epoch * epoch_length], minlength=len(drawn))
            start = stop
        return drawn


def _endless(dataset: StreamDataset, lane: int, lanes: int) -> Iterator[Sample | BrokenSample]:
    for number in itertools.count():
        usable = False
        for item in dataset.stream(number, lane, lanes):
            usable = usable or isinstance(item, Sample)
            yield item
        if not usable:
            raise DataError(f"{dataset.name}: reader {lane + 1} of {lanes} found no usable sample in a whole pass over {dataset.count}. "
                            "Check the tars; if they hold few samples, lower loader.workers.")


class _Positions:
    """The batch sampler of DataLoader."""

    def __init__(self, data: TrainingData, start: int) -> None:
        self.data = data
        self.start = start

    def __iter__(self) -> Iterator[list[int]]:
        return self.data.positions(self.start)


class _Answers(Dataset):
    """Errors for users travel as values: DataLoader would put a traceback of the worker before their message."""

    def __init__(self, data: TrainingData) -> None:
        self.data = data

    def __getitem__(self, position: int) -> Item | Blip3oError:
        try:
            return self.data[position]
        except Blip3oError as error:
            return error


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and the SIGTERM of a batch system reach all processes; our workers end with us, not before."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))


def _started(loader: DataLoader) -> Iterator[list]:
    """Its workers run. DataLoader would raise out of a signal handler when one dies, in the middle of an update; `next` tells it too."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


def _as_list(items: list) -> list:
    return items


def batches(data: TrainingData, start_position: int = 0, *, start_method: str | None = None) -> Iterator[list[Item]]:
    """This rank's micro-batches from a position on, without end. Closing the iterator ends its workers; they also end with us.

    Args:
        start_method: "fork", "spawn" or "forkserver" for the workers; None is the system's own.
    Raises: DataError if no usable sample is found, or a worker was killed.
    """
    if not data.workers:
        for positions in data.positions(start_position):
            yield [data[position] for position in positions]
        return
    loader = DataLoader(
        _Answers(data), batch_sampler=_Positions(data, start_position), num_workers=data.workers, collate_fn=_as_list,
        prefetch_factor=PREFETCH, multiprocessing_context=start_method, worker_init_fn=_outlive_signals,
        generator=torch.Generator().manual_seed(0),  # else it takes a number from the global one
    )  # fmt: skip
    iterator = _started(loader)
    try:
        while True:
            items = _next_of(iterator, data.workers)
            for item in items:
                if isinstance(item, Blip3oError):
                    raise item
            yield items
    finally:
        del iterator  # a traceback may keep this frame; workers that the garbage collector ends are waited for 5 s each


def _next_of(iterator: Iterator[list], workers: int) -> list:
    try:
        return next(iterator)
    except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
        message = str(error).strip()
        dead = message.startswith("DataLoader worker (pid") if isinstance(error, RuntimeError) else not message.startswith("Caught ")
        if not dead:  # raised by `prepare` in the worker
            raise
        raise DataError(f"a data worker was killed, usually out of memory: lower loader.workers, which is {workers} "
                        f"({message}).") from error
