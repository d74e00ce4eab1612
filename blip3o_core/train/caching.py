"""Fills the caches before training: one frozen network in memory at a time, each entry computed once, over all processes."""

import itertools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.broken import BrokenSample
from ..data.cache import FeatureCache
from ..data.prepare import Example
from .datasets import CACHED_TASKS, count_samples, first_samples, validation_examples
from .frozen import FrozenNetworks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .run import Opened

log = logging.getLogger(__name__)

BATCH = 8


def fill_caches(opened: "Opened", frozen: FrozenNetworks, accelerator: "Accelerator") -> None:
    """Computes what is missing and writes it entry by entry: an interrupted run goes on where it was. Raises OutputError (disk full)."""
    caches = opened.caches
    if caches.targets is not None:
        _fill(opened, accelerator, caches.targets, "EVA-CLIP features", lambda example: (example.target_key, example.target),
              lambda examples: frozen.embeddings(torch.stack([e.target_pixels for e in examples])).to(frozen.dtype))  # fmt: skip
        if any(options.task == "decode" for options in opened.config.data):
            frozen.zero_embedding()
        frozen.release()
    if caches.states is not None:
        _fill(opened, accelerator, caches.states, "query states", lambda example: (example.states_key, example.states),
              lambda examples: frozen.query_states(examples).to(frozen.dtype))  # fmt: skip
        frozen.release()
    accelerator.wait_for_everyone()


def _fill(
    opened: "Opened", accelerator: "Accelerator", cache: FeatureCache, title: str,
    entry: Callable[[Example], tuple[str, Tensor | None]], compute: Callable[[list[Example]], Tensor],
) -> None:  # fmt: skip
    pending: dict[str, Example] = {}

    def flush() -> None:
        if pending:
            for key, features in zip(pending, compute(list(pending.values())), strict=True):
                cache.store(key, features)
            pending.clear()

    sets = opened.sets
    total = sum(count for count, options in zip(sets.counts, sets.options, strict=True) if options.task in CACHED_TASKS)
    with tqdm(total=total, desc=f"caching {title}", unit="sample", disable=not accelerator.is_main_process) as bar:
        for example in _share(_examples(opened, bar.update), accelerator.process_index, accelerator.num_processes):
            key, present = entry(example)
            if key and present is None and key not in pending:
                pending[key] = example
                if len(pending) == BATCH:
                    flush()
        flush()


def _examples(opened: "Opened", seen: Callable[[int], object]) -> Iterator[Callable[[], list[Example]]]:
    """Samples of the cached tasks and of validation, as functions that prepare their variants: only the process that needs them decodes."""
    for dataset, preparer in zip(opened.sets.datasets, opened.sets.preparers, strict=True):
        if dataset.task not in CACHED_TASKS:
            continue
        for sample in itertools.islice(first_samples(dataset), count_samples(dataset)):
            seen(1)
            if not isinstance(sample, BrokenSample):
                yield lambda preparer=preparer, sample=sample: list(preparer.variants(sample))
    if opened.config.validation.every:  # may have datasets of its own, and is never augmented
        for example in validation_examples(opened.validation_sets, opened.config.validation.samples):
            yield lambda example=example: [example]


def _share(makers: Iterator[Callable[[], list[Example]]], rank: int, world: int) -> Iterator[Example]:
    for make in itertools.islice(makers, rank, None, world):
        try:
            yield from make()
        except BrokenSample as error:
            log.warning("%s: not cached (%s)", error.name, error.reason)  # training counts it and goes on
