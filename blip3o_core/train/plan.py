"""The dry run: everything is opened, the networks are loaded, one batch goes forward, and a person reads what would happen."""

import torch
from safetensors.torch import save
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data.broken import BrokenSample
from ..data.cache import TENSOR
from ..data.prepare import Augmentation, Example, possible
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
RELEASED = "not counted: released when cached"
MEASURED_EXAMPLES = 16
"""Of a larger micro-batch so many are run; what the others take is added in proportion."""
OPTIMIZER_BYTES = {"adamw": 8, "muon": 8, "adamw8bit": 2, "prodigy": 16}
"""Per trained parameter: moments, of which muon has one less for hidden matrices; for prodigy two more copies."""


def plan(config: TrainConfig) -> str:
    """Loads data and model in this process, trains and writes nothing -> a report. Raises Blip3oError as the run itself would."""
    device = resolve_device(config.train.device)
    precision = resolve_precision(config.train.precision, device)
    opened = open_run(config, precision)
    frozen = FrozenNetworks(opened.sources, device=device, dtype=frozen_dtype(precision))
    model = build_model(config, opened.sources, frozen, opened.sets.tasks, precision=precision)
    model.set_training(True)
    batch = _first_batch(opened, min(config.train.batch_size, MEASURED_EXAMPLES))
    activations = activation_bytes(model, batch, precision)
    if further := config.train.batch_size - len(batch):
        half = len(batch) // 2
        activations += (activations - activation_bytes(model, batch[:half], precision)) * further // (len(batch) - half)
    sections = [_header(config, opened, device, precision), _data(config, opened), _trained(model),
                _memory(config, model, frozen, activations), _disk(config, opened, frozen.dtype)]  # fmt: skip
    return "\n\n".join(section for section in sections if section)


def activation_bytes(model: TrainingModel, batch: list[Example], precision: str) -> int:
    """What one forward pass leaves in memory for its backward pass: measured, without weights."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    made = _MadeStorages()
    with made, torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        losses = model(batch, [Draw((0, "plan", index)) for index in range(len(batch))])
    assert losses.requires_grad  # and holds what was kept
    networks = [model, *(getattr(model.frozen, name) for name in model.frozen.loaded)]  # some were loaded in this pass
    weights = {tensor.untyped_storage()._cdata for network in networks for tensor in (*network.parameters(), *network.buffers())}
    return sum(size for address, size in made.alive() if address not in weights)


class _MadeStorages(TorchDispatchMode):
    """Notes the memory behind every tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        return result

    def alive(self) -> list[tuple[int, int]]:
        """(address, bytes) of what is still in use; the weak references keep addresses from being used twice."""
        return [(address, size) for address, (reference, size) in self._made.items() if not reference.expired()]


def _first_batch(opened: Opened, size: int) -> list[Example]:
    """`size` examples, all tasks in turn. Raises DataError if nothing can be read."""
    per_set: list[list[Example]] = []
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
    return (f"Dry run: nothing is trained, nothing is written.\n\nmodel     {opened.sources.checkpoint.folder}\n"
            f"training  {what}, {precision} on {device}\noutput    {config.output.folder}")  # fmt: skip


def _data(config: TrainConfig, opened: Opened) -> str:
    mixture = opened.sets.mixture(config.train.seed)
    per_update = config.train.batch_size * config.train.gradient_accumulation
    lines = [f"{'data':<48}{'task':<16}{'samples':>10}{'share':>9}"]
    for dataset, samples, count in zip(opened.sets.datasets, opened.sets.counts, mixture.counts, strict=True):
        lines.append(f"{dataset.name[-46:]:<48}{dataset.task:<16}{samples:>10,}{count / mixture.epoch_length:>9.1%}")
    epochs = config.train.steps * per_update / mixture.epoch_length
    lines.append(f"{'an epoch':<64}{mixture.epoch_length:>10,}")
    parts = f"batch_size {config.train.batch_size} x gradient_accumulation {config.train.gradient_accumulation}"
    lines.append(f"\n{config.train.steps:,} steps of {per_update} samples ({parts}), so every sample is seen {epochs:,.1f} times; with N "
                 "processes N times as often.")  # fmt: skip
    return "\n".join(lines)


def _trained(model: TrainingModel) -> str:
    lines = [f"{'network':<20}{'trained':>16}{'of':>18}"]
    for name, (trained, total) in parameters_by_part(model).items():
        lines.append(f"{name:<20}{trained:>16,}{total:>18,}")
    return "\n".join(lines)


def _memory(config: TrainConfig, model: TrainingModel, frozen: FrozenNetworks, activations: int) -> str:
    trained = sum(parameter.numel() for parameter in model.trained().values())
    rows = {
        "weights: frozen": sum(p.nbytes for p in model.parameters() if not p.requires_grad),
        "weights: trained": sum(p.nbytes for p in model.parameters() if p.requires_grad),
        f"weights: {', '.join(frozen.loaded)}" + (f" ({RELEASED})" if config.cache.enabled else ""):
            sum(p.nbytes for name in frozen.loaded for p in getattr(frozen, name).parameters()),
        "gradients": 4 * trained,
        "optimizer": OPTIMIZER_BYTES[config.optimizer.name] * trained,
        "moving average": 4 * trained if config.train.ema_decay else 0,
        f"activations of {config.train.batch_size} samples (measured)": activations,
    }  # fmt: skip
    counted = sum(size for name, size in rows.items() if RELEASED not in name)
    lines = [f"{'memory per process':<56}{'MiB':>12}"]
    lines += [f"{name:<56}{size / MIB:>12,.1f}" for name, size in rows.items() if size]
    lines.append(f"{'together, without temporary buffers':<56}{counted / MIB:>12,.1f}")
    if model.device.type == "cuda":
        held = torch.cuda.memory_reserved(model.device)  # by this dry run
        free = torch.cuda.mem_get_info(model.device)[0] + held
        lines.append(f"{f'free on {torch.cuda.get_device_name(model.device)}':<56}{free / MIB:>12,.1f}")
        if counted > 0.9 * free:
            lines.append("This is too much, or close to it. Less is taken by train.gradient_checkpointing = true, cache.enabled = true, "
                         "a lower train.batch_size with a higher train.gradient_accumulation, a lower lora.rank.")  # fmt: skip
    return "\n".join(lines)


def _disk(config: TrainConfig, opened: Opened, dtype: torch.dtype) -> str:
    if opened.caches.targets is None:
        return ""
    size = opened.sources.checkpoint.dit_config
    embedding = _entry_bytes((size.in_channels, 8, 8), dtype)
    state = _entry_bytes((opened.sources.checkpoint.num_queries, size.context_dim), dtype)
    targets = states = 0
    for count, preparer, options in zip(opened.sets.counts, opened.sets.preparers, opened.sets.options, strict=True):
        if options.task in CACHED_TASKS:
            targets += count * len(possible(options.flip)) * embedding
        if options.task in GENERATION_TASKS and opened.caches.states is not None:
            states += _state_entries(options.task, count, preparer.augmentation) * state
    lines = [f"{'disk for caches, at most':<56}{'MiB':>12}", f"{'embeddings':<56}{targets / MIB:>12,.3f}"]
    if opened.caches.states is not None:
        lines.append(f"{'query states':<56}{states / MIB:>12,.3f}")
    return "\n".join([*lines, f"in {opened.caches.targets.folder.parent}"])


def _state_entries(task: str, count: int, augmentation: Augmentation) -> int:
    """Different prompts that draws of `count` samples can give."""
    if task == "reconstruct":
        return count * len(possible(augmentation.flip))
    captioned, empty = (value in possible(augmentation.caption_dropout) for value in (False, True))
    return count * captioned + (count if task == "edit" else 1) * empty  # without a picture all empty prompts are one


def _entry_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return len(save({TENSOR: torch.zeros(shape, dtype=dtype)}))
