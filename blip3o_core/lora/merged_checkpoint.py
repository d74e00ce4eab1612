"""A checkpoint with LoRAs merged into its weights."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from ..checkpoint.save import Deferred, OnWrite, save_derived
from ..checkpoint.shards import TensorEntry, open_shards, read_tensor
from ..errors import InputError
from ..variants.blip3o import Blip3oCheckpoint
from .apply import updated_weight
from .chosen import ChosenLora, component_entries
from .files import PREFIXES, Adapter

Update = tuple[Adapter | Tensor, float]
"""What is done to one weight, and how strongly: an adapter, or a difference that is added."""


def save_merged(
    checkpoint: Blip3oCheckpoint, loras: Sequence[ChosenLora], output: Path, *, overwrite: bool = False, on_write: OnWrite | None = None
) -> int:
    """Writes `output`, a complete checkpoint; returns how many tensors differ from `checkpoint`. One tensor at a time is in memory.

    Every update is rounded to the dtype of the weights by itself, as when it is merged at loading: pictures are the same.
    Raises: InputError if a weight to change is quantised, OutputError if `output` exists or can't be written.
    """
    updates: dict[str, list[Update]] = {}  # name in the files -> in this order
    entries = open_shards(checkpoint.folder, "model")
    for lora in loras:
        for component in PREFIXES:
            names = {name: entry.name for name, entry in component_entries(checkpoint, component).items()}
            for path, adapter in lora.adapters(component).items():
                updates.setdefault(names[f"{path}.weight"], []).append((adapter, lora.strength))
            for parameter, difference in lora.differences(component).items():
                updates.setdefault(names[parameter], []).append((difference, lora.strength))
        if lora.file.queries is not None:
            queries = checkpoint.components["queries"]["latent_queries"].name
            updates.setdefault(queries, []).append((lora.file.queries, lora.strength))
    quantised = sorted(name for name in updates if not entries[name].dtype.is_floating_point or entries[name].dtype.itemsize < 2)
    if quantised:
        raise InputError(f"{checkpoint.folder}: {len(quantised)} of the weights to change are quantised, first {quantised[0]}. Merge into "
                         "the original checkpoint.")
    merged = {name: Deferred(entries[name].shape, entries[name].dtype, partial(_updated, entries[name], steps))
              for name, steps in updates.items()}  # fmt: skip
    save_derived(checkpoint.folder, output, merged, entries, overwrite=overwrite, on_write=on_write)
    return len(merged)


def _updated(entry: TensorEntry, updates: Sequence[Update]) -> Tensor:
    value = read_tensor(entry)
    for update, strength in updates:
        if isinstance(update, Adapter):
            value = updated_weight(value, update, strength).to(entry.dtype)
        else:
            value = (value.float() + strength * update.float()).to(entry.dtype)
    return value
