"""How the host describes our diffusion models: sizes, precisions, latents."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import comfy.ops
import torch
from comfy import latent_formats, model_base, supported_models, supported_models_base

from ...blip3o_core.errors import CheckpointError
from ...blip3o_core.models.nextdit import NextDiTConfig
from ...blip3o_core.models.sdxl import vae_factor
from ...blip3o_core.variants.sana_decoder import SanaDecoderCheckpoint
from .diffusion_models import FlowModel, SdxlDecoderModel
from .latent_formats import ClipEmbedding, DcaeLatent
from .sana import SanaDecoderModel

HOST_GROUPS = 32  # group count that the host's UNet has built in


class NextDiTModelConfig(supported_models_base.BASE):
    """The stage that samples CLIP embeddings."""

    unet_config = {}
    unet_extra_config = {}
    sampling_settings = {"shift": 1.0, "multiplier": 1000}
    latent_format = ClipEmbedding
    memory_usage_factor = 8.0  # 64 tokens: weights, not activations, are what takes memory
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]  # in order of preference; trained in bf16

    def __init__(self, config: NextDiTConfig) -> None:
        super().__init__(asdict(config))
        self.latent_format.latent_channels = config.in_channels

    def model_type(self, state_dict, prefix=""):
        return model_base.ModelType.FLOW

    def inpaint_model(self) -> bool:
        return False

    def get_model(self, state_dict, prefix="", device=None) -> FlowModel:
        return FlowModel(self, device=device)


class SdxlDecoderModelConfig(supported_models.SDXL):
    """The stage that turns embeddings into latents: core's SDXL with the widths of the checkpoint."""

    unet_extra_config = {}
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]

    def __init__(self, unet_config: Mapping[str, Any], vae_config: Mapping[str, Any]) -> None:
        super().__init__(unet_config_from_diffusers(unet_config))
        self.size_embedding_width = unet_config["addition_time_embed_dim"]
        self.norm_groups = unet_config["norm_num_groups"]
        self.latent_format = latent_formats.SDXL()
        self.latent_format.scale_factor = vae_config["scaling_factor"]
        self.latent_format.spacial_downscale_ratio = vae_factor(vae_config)

    def set_inference_dtype(self, dtype, manual_cast_dtype, device=None) -> None:
        """Also the moment at which layers can be chosen: the host counts 32 groups, smaller models have fewer."""
        self.unet_config["dtype"] = dtype
        self.manual_cast_dtype = manual_cast_dtype
        if self.norm_groups != HOST_GROUPS:
            self.custom_operations = with_group_count(comfy.ops.pick_operations(dtype, manual_cast_dtype), self.norm_groups)

    def inpaint_model(self) -> bool:
        return False

    def get_model(self, state_dict, prefix="", device=None) -> SdxlDecoderModel:
        return SdxlDecoderModel(self, device=device)


class SanaDecoderModelConfig(supported_models_base.BASE):
    """The stage that turns SigLIP2 embeddings into latents of the DC-AE."""

    unet_config = {}
    unet_extra_config = {}
    latent_format = DcaeLatent
    memory_usage_factor = 4.0
    supported_inference_dtypes = [torch.bfloat16, torch.float32]  # float16 overflows
    builds_empty = True  # weights are assigned, not copied

    def __init__(self, checkpoint: SanaDecoderCheckpoint) -> None:
        super().__init__({"make_connector": checkpoint.empty_connector, "make_transformer": checkpoint.empty_transformer})
        dpm = checkpoint.scheduler == "dpmsolver++"
        self.sampling_settings = {"shift": checkpoint.flow_shift if dpm else 1.0, "multiplier": 1000}
        self.truncates = dpm
        self.latent_format = DcaeLatent()
        self.latent_format.latent_channels = checkpoint.latent_channels
        self.latent_format.scale_factor = checkpoint.configs["vae"]["scaling_factor"]
        self.latent_format.spacial_downscale_ratio = checkpoint.factor

    def model_type(self, state_dict, prefix=""):
        return model_base.ModelType.FLOW

    def inpaint_model(self) -> bool:
        return False

    def get_model(self, state_dict, prefix="", device=None) -> SanaDecoderModel:
        return SanaDecoderModel(self, device=device)


def with_group_count(operations, groups: int):
    """The same layers, but every GroupNorm has `groups` groups."""

    class GroupCountOperations(operations):
        class GroupNorm(operations.GroupNorm):
            def __init__(self, num_groups: int, *args, **kwargs) -> None:
                super().__init__(groups, *args, **kwargs)

    return GroupCountOperations


class WidthRatio(float):
    """A level's width, as a multiple of the first one's. The host multiplies by it and expects a whole number: of 32 by 2.5, 80."""

    def __mul__(self, width: int) -> int:
        return round(float(self) * width)

    __rmul__ = __mul__


def unet_config_from_diffusers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the host's UNetModel from a diffusers UNet2DConditionModel configuration of the SDXL kind.

    Raises CheckpointError if its heads don't share one width, which the host's UNet can't express.
    """
    channels = config["block_out_channels"]
    levels = range(len(channels))
    layers = config["layers_per_block"]
    heads, depths = (value if isinstance(value, (list, tuple)) else [value] * len(channels)
                     for value in (config["attention_head_dim"], config["transformer_layers_per_block"]))  # fmt: skip
    attending = {level for level in levels if "CrossAttn" in config["down_block_types"][level]} | {levels[-1]}  # the last: the middle
    head_widths = {channels[level] // heads[level] for level in attending}  # historical naming: attention_head_dim counts heads
    if len(head_widths) != 1:
        raise CheckpointError(f"the decoder's UNet has heads of widths {sorted(head_widths)}; ComfyUI's UNet needs one width.")
    down = [depths[level] if "CrossAttn" in config["down_block_types"][level] else 0 for level in levels]
    up = [depths[level] if "CrossAttn" in config["up_block_types"][-1 - level] else 0 for level in levels]
    return {
        "image_size": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": channels[0],
        "channel_mult": [WidthRatio(width / channels[0]) for width in channels],
        "num_res_blocks": [layers] * len(channels),
        "transformer_depth": [depth for depth in down for _ in range(layers)],
        "transformer_depth_output": [depth for depth in up for _ in range(layers + 1)],
        "transformer_depth_middle": depths[-1],
        "num_heads": -1,
        "num_head_channels": head_widths.pop(),
        "context_dim": config["cross_attention_dim"],
        "adm_in_channels": config["projection_class_embeddings_input_dim"],
        "num_classes": "sequential",
        "use_spatial_transformer": True,
        "use_linear_in_transformer": config["use_linear_projection"],
        "use_temporal_attention": False,
        "use_temporal_resblock": False,
        "use_checkpoint": False,
        "legacy": False,
    }
