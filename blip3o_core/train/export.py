"""What a run leaves for use: a LoRA file, or a complete checkpoint in the published layout."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint.save import save_derived
from ..checkpoint.shards import open_shards, read_tensor
from ..lora.apply import for_host
from ..lora.files import LoraFile, lora_metadata, write_lora
from ..variants.blip3o import published_name
from .adapters import read_adapters
from .config import TrainConfig, as_dict
from .frozen import Sources
from .model import TrainingModel

MODEL_FOLDER = "model"


def export_lora(
    path: Path, config: TrainConfig, sources: Sources, model: TrainingModel, values: Mapping[str, Tensor], step: int
) -> None:
    """Writes the LoRA file. `values`: trained tensors by their name in `model`. Raises OutputError."""
    components = {"dit": ("dit.", model.dit), "language_model": ("backbone.language_model.", None)}
    if model.backbone is not None:
        components["language_model"] = ("backbone.language_model.", model.backbone.language_model)
    adapters = {}
    for part in config.lora.parts:
        prefix, network = components[part]
        own = {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        adapters[part] = read_adapters(network, own)
    queries = None
    if config.lora.latent_queries:
        queries = values["backbone.latent_queries"].detach().float().cpu() - base_queries(sources)
    networks = {part: components[part][1] for part in config.lora.parts}
    lora = for_host(LoraFile(adapters=adapters, queries=queries), networks)  # DoRA as ComfyUI reads it
    metadata = lora_metadata(
        lora, title=config.output.name, fingerprint=sources.checkpoint.fingerprint, base_model=sources.checkpoint.folder.resolve().name,
        trigger=config.lora.trigger, training_steps=step, config=without_paths(config),
    )  # fmt: skip
    write_lora(path, dataclasses.replace(lora, metadata=metadata))


def base_queries(sources: Sources) -> Tensor:
    """The learned queries as published (1, Q, H) float32."""
    return read_tensor(sources.checkpoint.components["queries"]["latent_queries"]).float()


def without_paths(config: TrainConfig) -> dict[str, Any]:
    """The configuration for a file that is passed on: names of files without the folders of this machine."""
    values = as_dict(config)
    for section, key in (("model", "path"), ("model", "vision_encoder"), ("model", "decoder"), ("cache", "folder"), ("output", "folder")):
        values[section][key] = Path(values[section][key]).name
    for data in [*values["data"], *values["validation"]["data"]]:
        data["path"], data["images"] = Path(data["path"]).name, Path(data["images"]).name
    values["samples"]["images"] = [Path(name).name for name in values["samples"]["images"]]
    return values


def export_model(folder: Path, config: TrainConfig, sources: Sources, model: TrainingModel, values: Mapping[str, Tensor], *,
                 overwrite: bool, scaling_factor: float | None = None) -> None:  # fmt: skip
    """Writes a complete checkpoint: trained tensors anew, in the precision of the original, all others linked. Raises OutputError.

    Args:
        scaling_factor: of a trained VAE: 1 / standard deviation of its latents.
    """
    checkpoint, decoder = sources.checkpoint, sources.decoder
    components = checkpoint.components
    known = {
        "dit.": components["dit"], "backbone.": {**components["language_model"], **components["queries"]},
        "output_head.": components["output_head"], "vision_tower.": components["vision_tower"],
    }  # fmt: skip
    tensors: dict[str, Tensor] = {}
    changes: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        for prefix, entries in known.items():
            if name.startswith(prefix):
                entry = entries[name.removeprefix(prefix)]
                tensors[entry.name] = value.detach().to(entry.dtype)
    if "clip" in config.train.parts:
        encoder = sources.require_vision_encoder()
        for name, entry in encoder.entries.items():
            tensors[published_name("vision_encoder", name)] = values[f"vision_encoder.{name}"].detach().to(entry.dtype)
        changes["config.json"] = {"gen_vision_config": encoder.config.untold or None}
    decoder_tensors = {}
    for part in ("unet", "vae"):
        own = {name.removeprefix(f"{part}."): value for name, value in values.items() if name.startswith(f"{part}.")}
        if own:
            stored = decoder.unet if part == "unet" else decoder.vae
            decoder_tensors[part] = {name: value.detach().to(stored[name].dtype) for name, value in own.items()}
    if scaling_factor is not None:
        changes["diffusion-decoder/vae/config.json"] = {"scaling_factor": scaling_factor}
    save_derived(checkpoint.folder, folder, tensors, open_shards(checkpoint.folder, "model"),
                 decoder=None if decoder is None else decoder.folder,
                 decoder_tensors=decoder_tensors, config_changes=changes, overwrite=overwrite)  # fmt: skip
