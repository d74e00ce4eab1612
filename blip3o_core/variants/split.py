"""Queries and diffusion transformer without the backbone, for those who have Qwen2.5-VL already: written, and put together again.

The published backbone is Qwen2.5-VL-Instruct with a few more tokens (`[IMG]` and others): their rows of the embedding matrix, and of the
output head where it is not tied, travel with the split.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.fingerprint import tensors_fingerprint
from ..checkpoint.save import DECODER_FOLDER, Deferred, OnWrite, link_tree, whole_folder, write_safetensors
from ..checkpoint.shards import SCALE, TensorEntry
from ..errors import CheckpointError, InputError

KEY = "blip3o_split"
"""Of config.json: {"language_model": fingerprint, "rows_from": first token that Qwen2.5-VL doesn't have}."""
EMBED_ROWS, HEAD_ROWS = "blip3o_split.embed_tokens", "blip3o_split.lm_head"
PARTS = ("dit", "queries")
BORROWED = ("language_model", "vision_tower", "output_head")
EMBEDDING, HEAD = "language_model.embed_tokens.weight", "weight"
COPIED = (".json", ".txt", ".model")  # configuration and tokenizer

Components = Mapping[str, Mapping[str, TensorEntry]]


def language_fingerprint(components: Components) -> str:
    """Of the language model without its embedding matrix, whose number of rows differs between a split's base and Qwen2.5-VL."""
    return tensors_fingerprint({name: entry for name, entry in components["language_model"].items() if name != EMBEDDING})


def require_original_precision(source: Path, components: Components) -> None:
    """Raises InputError for a model in 8 or 4 bits, whose language model is no Qwen2.5-VL-Instruct any more."""
    if any(name.endswith(f".{SCALE}") for name in components["language_model"]):
        raise InputError(f"{source} is quantised. Give the model that it was made from.")


def write_split(
    source: Path, config: Mapping[str, Any], components: Components, output: Path, *, rows_from: int, decoder: Path | None = None,
    overwrite: bool = False, on_write: OnWrite | None = None,
) -> int:  # fmt: skip
    """Writes the folder; returns the bytes of its weights.

    rows_from: the first token that Qwen2.5-VL doesn't have. decoder: folder that becomes diffusion-decoder/, by hard links.
    Raises OutputError if `output` exists or can't be written, InputError for a model in 8 or 4 bits, which fits no Qwen2.5-VL.
    """
    require_original_precision(source, components)
    embedding = components["language_model"][EMBEDDING]
    kept = {entry.name: entry for part in PARTS for entry in components[part].values()}
    kept[EMBED_ROWS] = embedding.rows(rows_from, embedding.shape[0])
    if components["output_head"]:
        head = components["output_head"][HEAD]
        kept[HEAD_ROWS] = head.rows(rows_from, head.shape[0])
    with whole_folder(output, overwrite=overwrite) as folder:
        tensors = {name: Deferred.stored(entry) for name, entry in kept.items()}
        write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"}, on_write)
        if decoder is not None:
            link_tree(decoder, folder / DECODER_FOLDER, set())
        for file in source.iterdir():
            if file.is_file() and file.suffix in COPIED and file.name != "config.json" and not file.name.endswith(".index.json"):
                shutil.copyfile(file, folder / file.name)
        told = {**config, KEY: {"language_model": language_fingerprint(components), "rows_from": rows_from}}
        (folder / "config.json").write_text(json.dumps(told, indent=2) + "\n", "utf-8")
    return sum(entry.nbytes for entry in kept.values())


def joined(
    split: Components, rows: Mapping[str, TensorEntry], config: Mapping[str, Any], base: Components, source: Path, qwen: Path
) -> dict[str, dict[str, TensorEntry]]:
    """Components of the whole model: those of the split, with the backbone of `base`.

    Raises CheckpointError if the backbone is not the one that the split was made of.
    """
    told = config[KEY]
    try:
        wanted, rows_from, vocabulary = str(told["language_model"]), int(told["rows_from"]), int(config["vocab_size"])
        embed_rows = rows[EMBED_ROWS]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: this split is incomplete ({error!r}). Make it again: blip3o split.") from error
    if EMBEDDING not in base["language_model"] or not base["vision_tower"]:
        raise CheckpointError(f"{qwen}: holds no Qwen2.5-VL. Give the folder of Qwen2.5-VL-Instruct that belongs to the split.")
    found = language_fingerprint(base)
    if found != wanted:
        raise CheckpointError(f"{qwen}: another language model ({found}) than the one that {source} was split from ({wanted}). Give the "
                              "Qwen2.5-VL-Instruct of the same size, in its original precision.")

    def with_rows(entry: TensorEntry, further: TensorEntry) -> TensorEntry:
        if entry.shape[0] < rows_from or further.shape[0] != vocabulary - rows_from or entry.dtype != further.dtype:
            raise CheckpointError(f"{qwen}: {entry.name} is {list(entry.shape)} of {entry.dtype}, which does not go with the "
                                  f"{list(further.shape)} of {further.dtype} in {source}. Give the original files of both.")
        return entry.rows(0, rows_from).followed_by(further)

    components = {part: dict(split[part]) for part in split} | {part: dict(base[part]) for part in BORROWED}
    components["language_model"][EMBEDDING] = with_rows(components["language_model"][EMBEDDING], embed_rows)
    if HEAD_ROWS in rows and components["output_head"]:
        components["output_head"][HEAD] = with_rows(components["output_head"][HEAD], rows[HEAD_ROWS])
    elif HEAD_ROWS not in rows:  # tied, whatever the file of the base holds
        components["output_head"] = {}
    return components
