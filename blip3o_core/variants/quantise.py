"""A copy of a checkpoint whose language model is stored in 8 or 4 bits (`models.quantised`)."""

from pathlib import Path

from ..checkpoint.save import Deferred, OnWrite, save_derived
from ..checkpoint.shards import SCALE, TensorEntry, read_tensor
from ..errors import InputError
from ..models.quantised import FORMATS, quantise, stored_as
from .blip3o import SKIPPED, Blip3oCheckpoint

QUANTISED = ("language_model", "output_head")
FINE = "int8"
"""What embeddings and output head are stored in if the rest has 4 bits: one row of theirs is one word."""


def save_quantised(
    checkpoint: Blip3oCheckpoint, output: Path, kind: str, *, overwrite: bool = False, on_write: OnWrite | None = None
) -> int:
    """Writes a complete checkpoint folder; returns the bytes of its backbone. One matrix at a time is in memory.

    Matrices of the language model, embeddings and output head are quantised to `kind` of FORMATS, everything else is copied.
    Raises InputError for another kind or a checkpoint that is quantised already, OutputError if `output` exists or can't be written.
    """
    if kind not in FORMATS:
        raise InputError(f"format {kind!r} is unknown. Use one of {', '.join(FORMATS)}.")
    if checkpoint.is_quantised:
        raise InputError(f"{checkpoint.folder} is quantised already. Give the model that it was made from.")
    tensors: dict[str, Deferred] = {}
    backbone = 0
    for component, entries in checkpoint.components.items():
        if component == SKIPPED:
            continue
        for name, entry in entries.items():
            own = {entry.name: Deferred.stored(entry)}
            if component in QUANTISED and len(entry.shape) == 2:
                single = "embed_tokens" in name or component == "output_head"
                own = _quantised(entry, FINE if kind == "int4" and single else kind)
            tensors |= own
            backbone += sum(tensor.nbytes for tensor in own.values()) if component in ("language_model", "queries") else 0
    entries = {entry.name: entry for part, own in checkpoint.components.items() if part != SKIPPED for entry in own.values()}
    save_derived(checkpoint.folder, output, tensors, entries, config_changes={"config.json": {"blip3o_quantised": kind}},
                 overwrite=overwrite, on_write=on_write)  # fmt: skip
    return backbone


def _quantised(entry: TensorEntry, kind: str) -> dict[str, Deferred]:
    weight, scales = stored_as(entry.shape, kind)
    return {
        entry.name: Deferred(*weight, lambda: quantise(read_tensor(entry), kind)[0]),
        entry.name.removesuffix("weight") + SCALE: Deferred(*scales, lambda: quantise(read_tensor(entry), kind)[1]),
    }
