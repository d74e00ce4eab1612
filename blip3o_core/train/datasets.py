"""[[data]] sections -> opened datasets, how each is prepared, and the examples that validation and caches need."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..data.broken import BrokenSample
from ..data.cache import FeatureCache
from ..data.mixture import Mixture
from ..data.open import IndexedDataset, StreamDataset, open_dataset
from ..data.prepare import Augmentation, Example, Preparer
from ..data.sample import Sample
from ..errors import ConfigError, DataError
from .config import DataOptions, TrainConfig
from .frozen import Sources

CACHED_TASKS = ("text_to_image", "edit", "reconstruct", "decode")


@dataclass(frozen=True)
class Caches:
    """None where the network trains, or caching is off."""

    targets: FeatureCache | None = None
    states: FeatureCache | None = None

    @classmethod
    def of(cls, config: TrainConfig, sources: Sources, tasks: Sequence[str], dtype: torch.dtype) -> "Caches":
        """Folders named after network and precision, so that no other run reads them. Raises ConfigError for a random crop."""
        if not config.cache.enabled or not set(tasks) & set(CACHED_TASKS):
            return cls()
        for index, options in enumerate(config.data):
            if options.crop == "random" and options.task in CACHED_TASKS:
                raise ConfigError(f'data.{index}.crop is "random", which gives a new picture each time; caches can\'t hold that. Use '
                                  '"centre", or cache.enabled=false.')
        folder = Path(config.cache.folder or Path(config.output.folder) / "cache").expanduser()
        unified = [task for task in tasks if task in CACHED_TASKS and task != "decode"]
        kind = str(dtype).removeprefix("torch.")
        states = None
        if unified and not config.trains_language_side:
            states = FeatureCache(folder / f"states-{sources.language_fingerprint}-{kind}")
        return cls(FeatureCache(folder / f"eva-{sources.eva_fingerprint}-{kind}"), states)


@dataclass(frozen=True)
class TrainingSets:
    """Datasets in the order of their sections, each with its preparer."""

    datasets: tuple[IndexedDataset | StreamDataset, ...]
    preparers: tuple[Preparer, ...]
    options: tuple[DataOptions, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Without repetitions, in order."""
        return tuple(dict.fromkeys(dataset.task for dataset in self.datasets))

    @property
    def counts(self) -> tuple[int, ...]:
        """Samples of each dataset."""
        return tuple(count_samples(dataset) for dataset in self.datasets)

    def mixture(self, seed: int) -> Mixture:
        """The order in which they are drawn."""
        return Mixture(self.counts, [each.weight for each in self.options], [each.repeats for each in self.options], seed)


def count_samples(dataset: IndexedDataset | StreamDataset) -> int:
    """Of one dataset, streamed or not."""
    return dataset.count if hasattr(dataset, "stream") else len(dataset)


def open_training_sets(options: Sequence[DataOptions], config: TrainConfig, sources: Sources, caches: Caches) -> TrainingSets:
    """Raises DataError, ConfigError before anything heavy is done."""
    datasets, preparers = [], []
    for own in options:
        datasets.append(open_dataset(own.path, format=own.format, task=own.task, images=own.images, samples=own.samples,
                                     shuffle_buffer=own.shuffle_buffer, seed=config.train.seed))  # fmt: skip
        preparers.append(_preparer(own, config, sources, caches))
    return TrainingSets(tuple(datasets), tuple(preparers), tuple(options))


def _preparer(options: DataOptions, config: TrainConfig, sources: Sources, caches: Caches) -> Preparer:
    eva_size = sources.vision_encoder.config.image_size if sources.vision_encoder is not None else 0
    labels_embedding = options.task == "segment" and "clip" in config.trained_parts
    if (labels_embedding or options.task not in ("understand", "text", "autoencode", "segment")) and not eva_size:
        sources.require_vision_encoder()
    return Preparer(
        tokenizer=sources.checkpoint.tokenizer,
        augmentation=Augmentation(options.trigger, options.caption_dropout, options.flip, options.crop),
        seed=config.train.seed,
        eva_size=eva_size,
        picture_size=_picture_size(options.task, config, sources),
        labels_embedding=labels_embedding,
        marks_changes=config.objective.changed_weight != 1,
        image_side=sources.checkpoint.image_side,
        closed_turn=config.train.prompt_form == "reference",
        max_pixels=config.loader.max_pixels,
        max_tokens=config.loader.max_tokens,
        targets=caches.targets,
        states=caches.states,
    )


def _picture_size(task: str, config: TrainConfig, sources: Sources) -> int:
    if task not in ("decode", "autoencode"):
        return 0
    decoder = sources.require_decoder()
    side = config.objective.picture_size or decoder.unet_config["sample_size"] * decoder.factor
    smallest = decoder.factor * 2 ** (len(decoder.unet_config["block_out_channels"]) - 1)
    if side % smallest:
        raise ConfigError(f"objective.picture_size = {side} is not a multiple of {smallest}, which this decoder needs.")
    return side


def first_samples(dataset: IndexedDataset | StreamDataset) -> Iterator[Sample | BrokenSample]:
    """All samples in a fixed order, broken ones as such."""
    if hasattr(dataset, "stream"):
        yield from dataset.stream(0, 0, 1)
        return
    for index in range(len(dataset)):
        try:
            yield dataset.sample(index)
        except BrokenSample as error:
            yield error


def validation_examples(sets: TrainingSets, per_task: int) -> list[Example]:
    """The first readable samples of each task, without augmentation. Raises DataError if a dataset has none."""
    examples: list[Example] = []
    found: dict[str, int] = {}
    for dataset, preparer in zip(sets.datasets, sets.preparers, strict=True):
        plain = replace(preparer, augmentation=Augmentation(trigger=preparer.augmentation.trigger))
        before = found.get(dataset.task, 0)
        for sample in first_samples(dataset):
            if found.get(dataset.task, 0) >= per_task:
                break
            if isinstance(sample, BrokenSample):
                continue
            try:
                examples.append(plain(sample, len(examples)))
            except BrokenSample:
                continue
            found[dataset.task] = found.get(dataset.task, 0) + 1
        if found.get(dataset.task, 0) == before == 0:
            raise DataError(f"{dataset.name}: no readable sample for validation. Check the files, or set validation.every=0.")
    return examples
