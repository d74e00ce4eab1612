"""The folder that peft reads and writes: adapter_config.json and adapter_model.safetensors, one such pair per network.

Adapters of the diffusion transformer are in the folder itself, those of the language model in its `language_model/`:
`PeftModel.from_pretrained(network, folder)` loads each. What peft has no place for (learned queries, metadata) is in
blip3o_extra.safetensors. peft itself is not needed here.
"""

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.json_files import read_table
from ..checkpoint.save import whole_folder, write_safetensors
from ..checkpoint.shards import read_header, read_metadata
from ..errors import CheckpointError, InputError
from .files import Adapters, LoraFile, from_entries, named_tensors

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
EXTRA = "blip3o_extra.safetensors"
FOLDERS = {"dit": "", "language_model": "language_model"}
# options of peft under which the matrices alone are not the whole update, and the values under which they are
HARMLESS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "fan_in_fan_out": (False, None), "lora_bias": (False, None),
    "modules_to_save": (None, []), "layer_replication": (None, []), "trainable_token_indices": (None, []),
    "target_parameters": (None, []), "megatron_config": (None,),
}  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that also rewrite the base's weights


def write_peft_folder(folder: Path, lora: LoraFile, *, overwrite: bool = False) -> None:
    """Writes `folder`, whole or not at all; `read_peft_folder` gives `lora` back, bit by bit.

    Raises: OutputError if `folder` exists (unless `overwrite`) or can't be written; InputError if peft can't express `lora`.
    """
    if any(adapter.over_base for adapter in lora.all_adapters):
        raise InputError("this DoRA has magnitudes for ComfyUI, which depend on the base's weights; peft wants others. Name the base: "
                         "--model FOLDER.")
    for component, adapters in lora.adapters.items():
        with_magnitude = sum(adapter.magnitude is not None for adapter in adapters.values())
        if with_magnitude not in (0, len(adapters)):
            raise InputError(f"{with_magnitude} of {len(adapters)} adapters of the {component} are DoRA; a peft folder has all or none.")
    with whole_folder(folder, overwrite=overwrite) as temporary:
        for component, adapters in lora.adapters.items():
            place = temporary / FOLDERS[component]
            place.mkdir(exist_ok=True)
            (place / CONFIG).write_text(json.dumps(peft_config(adapters), indent=2) + "\n", "utf-8")
            write_safetensors(place / WEIGHTS, peft_tensors(adapters), {"format": "pt"})
        write_safetensors(temporary / EXTRA, named_tensors(replace(lora, adapters={})), lora.metadata)


def peft_config(adapters: Adapters) -> dict[str, Any]:
    """adapter_config.json: the most frequent rank and alpha, and patterns for the layers with others."""
    rank = Counter(adapter.rank for adapter in adapters.values()).most_common(1)[0][0]
    alpha = Counter(adapter.alpha for adapter in adapters.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": any(adapter.magnitude is not None for adapter in adapters.values()),
        "target_modules": sorted(adapters),
        "rank_pattern": {path: adapter.rank for path, adapter in sorted(adapters.items()) if adapter.rank != rank},
        "alpha_pattern": {path: adapter.alpha for path, adapter in sorted(adapters.items()) if adapter.alpha != alpha},
    }


def peft_tensors(adapters: Adapters) -> dict[str, torch.Tensor]:
    """The matrices under peft's names."""
    tensors = {}
    for path, adapter in adapters.items():
        name = f"base_model.model.{path}"
        tensors[f"{name}.lora_A.weight"] = adapter.down
        tensors[f"{name}.lora_B.weight"] = adapter.up
        if adapter.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = adapter.magnitude
    return tensors


def read_peft_folder(folder: Path) -> LoraFile:
    """Reads a folder of `write_peft_folder` or of peft's `save_pretrained` (of either network, told apart by layer names).

    Raises: CheckpointError if nothing is there, files are damaged, or the adapters do more than two matrices per layer can.
    """
    places = [place for place in (folder, folder / FOLDERS["language_model"]) if (place / CONFIG).is_file() or (place / WEIGHTS).is_file()]
    if not places and not (folder / EXTRA).is_file():
        hint = " adapter_model.bin is pickled and not read; save it again with safetensors." if any(folder.glob("*.bin")) else ""
        raise CheckpointError(f"{folder}: no {CONFIG} with {WEIGHTS} here, so this is no folder of peft.{hint}")
    adapters: dict[str, Adapters] = {}
    for place in places:
        for component, found in _read_network(place).items():
            if component in adapters:
                raise CheckpointError(f"{folder}: {component} adapters in the folder itself and in {place.name}/. Keep one of them.")
            adapters[component] = found
    extra = LoraFile({})
    if (folder / EXTRA).is_file():
        entries = read_header(folder / EXTRA)
        metadata = read_metadata(folder / EXTRA)
        extra = from_entries(entries, metadata, folder / EXTRA) if entries else LoraFile({}, metadata=metadata)
    return replace(extra, adapters=adapters)


def _read_network(place: Path) -> dict[str, Adapters]:
    config = _read_config(place / CONFIG)
    entries = read_header(place / WEIGHTS)
    found = from_entries(entries, {}, place / WEIGHTS)
    if found.differences or found.queries is not None:
        raise CheckpointError(f"{place / WEIGHTS}: holds more than adapters, which peft doesn't write.")
    return {component: {path: replace(adapter, alpha=_alpha(config, path, adapter.rank, place / CONFIG)) for path, adapter in group.items()}
            for component, group in found.adapters.items()}  # fmt: skip


def _read_config(file: Path) -> dict[str, Any]:
    if not file.exists():
        raise CheckpointError(f"{file}: missing; it holds the strength of the adapters. Copy the whole folder.")
    config = read_table(file)
    unfit = [f"{key} = {config[key]!r}" for key, values in HARMLESS.items() if key in config and config[key] not in values]
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(CHANGES_BASE):
        unfit.append(f"init_lora_weights = {start!r}, which changed the base (save with path_initial_model_for_weight_conversion)")
    if unfit:
        raise CheckpointError(f"{file}: {'; '.join(unfit)}. Only plain LoRA and DoRA can be converted.")
    return config


def _alpha(config: dict[str, Any], path: str, rank: int, file: Path) -> float:
    """As peft finds it: the first pattern that matches the end of the name. rsLoRA is folded in."""
    patterns = config.get("alpha_pattern") or {}
    try:
        pattern = next((key for key in patterns if _fits(key, path)), None)
        alpha = float(config["lora_alpha"] if pattern is None else patterns[pattern])
    except (KeyError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{file}: lora_alpha or alpha_pattern of {path} is no number ({error!r}).") from error
    if not math.isfinite(alpha):
        raise CheckpointError(f"{file}: alpha of {path} is {alpha}.")
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def _fits(pattern: str, path: str) -> bool:
    """Raises ValueError for a pattern that is more than a name with some wildcards: trying it might never end."""
    if len(re.findall(r"[*+?{]", pattern)) > 3 or "(" in pattern:
        raise ValueError(f"the pattern {pattern[:60]!r} is too intricate")
    return re.match(rf"(.*\.)?({pattern})$", path) is not None
