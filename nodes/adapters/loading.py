"""Checkpoint folders -> what travels on the host's sockets. Files are checked before a tensor is read."""

from collections.abc import Mapping
from pathlib import Path

import comfy.model_management as model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from comfy.supported_models_base import BASE
from torch import nn

from ...blip3o_core.checkpoint.load import fill, require_finite
from ...blip3o_core.checkpoint.shards import TensorEntry, read_tensor
from ...blip3o_core.errors import CheckpointError
from ...blip3o_core.variants.blip3o import Blip3oCheckpoint
from ...blip3o_core.variants.eva_clip import EvaClipCheckpoint
from ...blip3o_core.variants.sana_decoder import SanaDecoderCheckpoint
from ...blip3o_core.variants.sdxl_decoder import SdxlDecoderCheckpoint
from .hosting import HostedBackbone, HostedVisionEncoder, Origin, host_vae, use_host_layers
from .model_configs import NextDiTModelConfig, SanaDecoderModelConfig, SdxlDecoderModelConfig
from .progress import LoadProgress


def load_backbone(checkpoint: Blip3oCheckpoint) -> HostedBackbone:
    """The language side as stored, memory-mapped; the host decides where it lives."""
    patcher = _backbone_patcher(checkpoint)

    def load_vision() -> ModelPatcher:
        return _text_side_patcher(checkpoint.load_vision_tower(dtype=None, on_load=LoadProgress()))

    def load_head() -> ModelPatcher:
        head = checkpoint.load_output_head(patcher.model, dtype=None, on_load=LoadProgress())
        return _text_side_patcher(nn.Sequential(head))  # the patcher counts layers by name, which a bare layer has none of

    return HostedBackbone(patcher, checkpoint.tokenizer, load_vision, load_head, _origin(checkpoint), checkpoint.image_side)


def load_vision_encoder(source: EvaClipCheckpoint | SanaDecoderCheckpoint) -> HostedVisionEncoder:
    """EVA-CLIP, or the SigLIP2 of a SANA decoder, as stored; runs where the host runs diffusion models."""
    load = source.load_encoder if isinstance(source, SanaDecoderCheckpoint) else source.load
    encoder = use_host_layers(load(dtype=None, on_load=LoadProgress()))
    return HostedVisionEncoder(_patcher_class(False)(
        encoder, load_device=model_management.get_torch_device(), offload_device=model_management.unet_offload_device()
    ))  # fmt: skip


def load_dit(checkpoint: Blip3oCheckpoint, disable_dynamic: bool = False) -> ModelPatcher:
    """The diffusion transformer as a native MODEL."""
    weights = _read(checkpoint.components["dit"])
    patcher = _load_diffusion_model(NextDiTModelConfig(checkpoint.dit_config), weights, disable_dynamic)
    patcher.model.origin = _origin(checkpoint)
    patcher.cached_patcher_init = (_reload_dit, (checkpoint.folder, checkpoint.qwen))
    return patcher


def _backbone_patcher(checkpoint: Blip3oCheckpoint, disable_dynamic: bool = False) -> ModelPatcher:
    patcher = _text_side_patcher(checkpoint.load_backbone(dtype=None, on_load=LoadProgress()), disable_dynamic)
    patcher.cached_patcher_init = (_reload_backbone, (checkpoint.folder, checkpoint.qwen))
    return patcher


def _text_side_patcher(network: nn.Module, disable_dynamic: bool = False) -> ModelPatcher:
    return _patcher_class(disable_dynamic)(
        use_host_layers(network), load_device=model_management.text_encoder_device(),
        offload_device=model_management.text_encoder_offload_device(),
    )  # fmt: skip


def _reload_backbone(folder: Path, qwen: Path | None, disable_dynamic: bool = False) -> ModelPatcher:
    """What the host calls to build the same patcher again, for instance without dynamic memory."""
    return _backbone_patcher(Blip3oCheckpoint.open(folder, qwen=qwen), disable_dynamic)


def _reload_dit(folder: Path, qwen: Path | None, disable_dynamic: bool = False) -> ModelPatcher:
    return load_dit(Blip3oCheckpoint.open(folder, qwen=qwen), disable_dynamic)


def load_sdxl_unet(checkpoint: SdxlDecoderCheckpoint, disable_dynamic: bool = False) -> ModelPatcher:
    """The decoder's UNet as a native MODEL, under core's own key names."""
    config = SdxlDecoderModelConfig(checkpoint.unet_config, checkpoint.vae_config)
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    unknown = sorted(checkpoint.unet.keys() - names.keys())
    if unknown:
        raise CheckpointError(f"{checkpoint.folder / 'unet'}: {len(unknown)} tensors have no place in ComfyUI's UNet, first "
                              f"{unknown[0]}. Use the decoder of a published BLIP3-o model.")
    weights = {names[name]: tensor for name, tensor in _read(checkpoint.unet).items()}
    patcher = _load_diffusion_model(config, weights, disable_dynamic)
    patcher.cached_patcher_init = (_reload_sdxl_unet, (checkpoint.folder,))
    return patcher


def _reload_sdxl_unet(folder: Path, disable_dynamic: bool = False) -> ModelPatcher:
    return load_sdxl_unet(SdxlDecoderCheckpoint.open(folder), disable_dynamic)


def load_sdxl_vae(checkpoint: SdxlDecoderCheckpoint) -> comfy.sd.VAE:
    """The decoder's VAE as a native VAE, in the precision that the host picks for VAEs (never float16)."""
    dtype = model_management.vae_dtype(model_management.vae_device(), [torch.bfloat16, torch.float32])
    autoencoder = fill(checkpoint.empty_vae(), checkpoint.vae, component="decoder's VAE", source=checkpoint.folder / "vae",
                       dtype=dtype, on_load=LoadProgress())  # fmt: skip
    return host_vae(autoencoder, factor=checkpoint.factor)


def load_sana(checkpoint: SanaDecoderCheckpoint, disable_dynamic: bool = False) -> ModelPatcher:
    """Connector and transformer as a native MODEL."""
    parts = ("connector", "transformer")
    weights = _read({f"{part}.{name}": entry for part in parts for name, entry in checkpoint.parts[part].items()})
    patcher = _load_diffusion_model(SanaDecoderModelConfig(checkpoint), weights, disable_dynamic)
    patcher.cached_patcher_init = (_reload_sana, (checkpoint.folder, checkpoint.positions, checkpoint.scheduler))
    return patcher


def _reload_sana(folder: Path, positions: str, scheduler: str, disable_dynamic: bool = False) -> ModelPatcher:
    return load_sana(SanaDecoderCheckpoint.open(folder, positions=positions, scheduler=scheduler), disable_dynamic)


def load_dcae(checkpoint: SanaDecoderCheckpoint) -> comfy.sd.VAE:
    """The SANA decoder's autoencoder as a native VAE, never in float16."""
    dtype = model_management.vae_dtype(model_management.vae_device(), [torch.bfloat16, torch.float32])
    return host_vae(checkpoint.load_vae(dtype=dtype, on_load=LoadProgress()), factor=checkpoint.factor)


def _load_diffusion_model(config: BASE, weights: dict[str, torch.Tensor], disable_dynamic: bool) -> ModelPatcher:
    """The tail of core's `load_diffusion_model_state_dict`, for configurations that core can't guess from keys."""
    load_device, offload_device = model_management.get_torch_device(), model_management.unet_offload_device()
    supported = list(config.supported_inference_dtypes)
    dtype = model_management.unet_dtype(model_params=comfy.utils.calculate_parameters(weights), supported_dtypes=supported,
                                        weight_dtype=comfy.utils.weight_dtype(weights))  # fmt: skip
    config.set_inference_dtype(dtype, model_management.unet_manual_cast(dtype, load_device, supported))
    model = config.get_model(weights)
    patcher = _patcher_class(disable_dynamic)(model, load_device=load_device, offload_device=offload_device)
    if config.builds_empty:  # an empty network takes the tensors themselves; it has no place to copy them to
        for name, tensor in weights.items():
            weights[name] = tensor.to(offload_device, dtype)
    elif not model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    model.load_model_weights(weights, "", assign=bool(config.builds_empty) or patcher.is_dynamic())
    return patcher


def _origin(checkpoint: Blip3oCheckpoint) -> Origin:
    return Origin(checkpoint.fingerprint, checkpoint.folder.name)


def _patcher_class(disable_dynamic: bool) -> type[ModelPatcher]:
    # looked up at call time: the host rebinds CoreModelPatcher when it turns dynamic memory on
    return ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher


def _read(entries: Mapping[str, TensorEntry]) -> dict[str, torch.Tensor]:
    """Tensors as stored, memory-mapped, each checked for nan; cancellable."""
    progress, total, done, tensors = LoadProgress(), sum(entry.nbytes for entry in entries.values()), 0, {}
    for name, entry in entries.items():
        tensors[name] = read_tensor(entry)
        require_finite(entry, tensors[name])
        done += entry.nbytes
        progress("", done, total)
    return tensors
