"""The dry run: everything is opened, the networks are loaded, one batch goes forward, and a person reads what would happen."""

import torch

from ..data.broken import BrokenSample
from ..data.prepare import Example
from ..data.sample import GENERATION_TASKS
from ..errors import DataError
from ..runtime import resolve_device
from .build import build_model, frozen_dtype, parameters_by_part, resolve_precision
from .config import TrainConfig
from .datasets import CACHED_TASKS, first_samples
from .frozen import FrozenNetworks
from .model import TrainingModel
from .noise import Draw
from .run import Opened, open_run

MIB = 2**20
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16}  # per trained parameter: moments, and for prodigy two more copies
FILE_OVERHEAD = 200  # bytes of a header


def plan(config: TrainConfig) -> str:
    """Loads data and model in this process, trains and writes nothing -> a report. Raises Blip3oError as the run itself would."""
    device = resolve_device(config.train.device)
    precision = resolve_precision(config.train.precision, device)
    opened = open_run(config, precision)
    frozen = FrozenNetworks(opened.sources, device=device, dtype=frozen_dtype(precision))
    model = build_model(config, opened.sources, frozen, opened.sets.tasks, precision=precision)
    model.set_training(True)
    batch = _first_batch(opened)
    activations = activation_bytes(model, batch, precision)
    sections = [_header(config, opened, device, precision), _data(config, opened), _trained(model),
                _memory(config, model, frozen, activations), _disk(config, opened, frozen.dtype)]  # fmt: skip
    return "\n\n".join(section for section in sections if section)


def activation_bytes(model: TrainingModel, batch: list[Example], precision: str) -> int:
    """What one forward pass keeps for its backward pass: measured, without weights."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    holding = []  # keeps the graph, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), torch.autocast(
        model.device.type, dtype=dtype, enabled=dtype is not None
    ):
        holding.append(model(batch, [Draw((0, "plan", index)) for index in range(len(batch))]))
    return sum(kept.values())


def _first_batch(opened: Opened) -> list[Example]:
    """As many examples as a micro-batch, all tasks in turn. Raises DataError if nothing can be read."""
    per_set: list[list[Example]] = []
    size = opened.config.train.batch_size
    for dataset, preparer in zip(opened.sets.datasets, opened.sets.preparers, strict=True):
        own: list[Example] = []
        for position, sample in enumerate(first_samples(dataset)):
            if len(own) == size or position > 10 * size:
                break
            try:
                if isinstance(sample, BrokenSample):
                    raise sample
                own.append(preparer(sample, position))
            except BrokenSample:
                continue
        if not own:
            raise DataError(f"{dataset.name}: none of the first samples can be read. Check the files.")
        per_set.append(own)
    rows = [own[index % len(own)] for index in range(size) for own in per_set]
    return rows[:size]


def _header(config: TrainConfig, opened: Opened, device: torch.device, precision: str) -> str:
    what = f"LoRA of rank {config.lora.rank} on {', '.join(config.lora.parts)}" if config.train.method == "lora" else "full training"
    return f"{opened.sources.checkpoint.folder}: {what}, {precision} on {device}\noutput: {config.output.folder}"


def _data(config: TrainConfig, opened: Opened) -> str:
    mixture = opened.sets.mixture(config.train.seed)
    per_update = config.train.batch_size * config.train.gradient_accumulation
    lines = [f"{'data':<48}{'task':<16}{'samples':>10}{'share':>9}"]
    for dataset, samples, count in zip(opened.sets.datasets, opened.sets.counts, mixture.counts, strict=True):
        lines.append(f"{dataset.name[-46:]:<48}{dataset.task:<16}{samples:>10,}{count / mixture.epoch_length:>9.1%}")
    epochs = config.train.steps * per_update / mixture.epoch_length
    lines.append(f"{config.train.steps:,} steps of {per_update} samples per process ({config.train.batch_size} x "
                 f"{config.train.gradient_accumulation}) = {epochs:,.1f} epochs of {mixture.epoch_length:,} with one process")  # fmt: skip
    return "\n".join(lines)


def _trained(model: TrainingModel) -> str:
    lines = [f"{'network':<20}{'trained':>16}{'of':>18}"]
    for name, (trained, total) in parameters_by_part(model).items():
        lines.append(f"{name:<20}{trained:>16,}{total:>18,}")
    return "\n".join(lines)


def _memory(config: TrainConfig, model: TrainingModel, frozen: FrozenNetworks, activations: int) -> str:
    trained = sum(parameter.numel() for parameter in model.trained().values())
    rows = {
        "frozen weights": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "trained weights": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        "frozen networks" + (" (not while training: cached)" if config.cache.enabled else ""):
            sum(p.nbytes for name in frozen.loaded for p in getattr(frozen, name).parameters()),
        "gradients": 4 * trained,
        "optimizer": OPTIMIZER_BYTES[config.optimizer.name] * trained,
        "moving average": 4 * trained if config.train.ema_decay else 0,
        f"activations of {config.train.batch_size} samples (measured)": activations,
    }  # fmt: skip
    counted = sum(size for name, size in rows.items() if "not while training" not in name)
    lines = [f"{'memory per process':<56}{'MiB':>12}"]
    lines += [f"{name:<56}{size / MIB:>12,.1f}" for name, size in rows.items() if size]
    lines.append(f"{'together, without temporary buffers':<56}{counted / MIB:>12,.1f}")
    return "\n".join(lines)


def _disk(config: TrainConfig, opened: Opened, dtype: torch.dtype) -> str:
    if opened.caches.targets is None:
        return ""
    checkpoint = opened.sources.checkpoint
    samples = {options.task: 0 for options in opened.sets.options}
    for count, preparer, options in zip(opened.sets.counts, opened.sets.preparers, opened.sets.options, strict=True):
        own = preparer.augmentation
        samples[options.task] += count * (2 if 0 < own.flip < 1 else 1) * (2 if 0 < own.caption_dropout < 1 else 1)
    drawn = sum(count for task, count in samples.items() if task in GENERATION_TASKS)
    embedded = sum(count for task, count in samples.items() if task in CACHED_TASKS)
    size = checkpoint.dit_config
    targets = embedded * (64 * size.in_channels * 2 + FILE_OVERHEAD)
    states = 0 if opened.caches.states is None else drawn * (checkpoint.num_queries * size.context_dim * dtype.itemsize + FILE_OVERHEAD)
    lines = [f"{'disk for caches, at most':<56}{'MiB':>12}", f"{'embeddings':<56}{targets / MIB:>12,.1f}"]
    lines += [f"{'query states':<56}{states / MIB:>12,.1f}", f"in {opened.caches.targets.folder.parent}"]
    return "\n".join(lines)
