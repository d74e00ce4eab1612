"""transformers and diffusers modules under the host's memory management."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import comfy.ldm.models.autoencoder
import comfy.model_management as model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from PIL import Image
from torch import Tensor, nn

from ...blip3o_core.images import eva_pixel_values, siglip_pixel_values
from ...blip3o_core.models.qwen2_5_vl import Backbone, VisionTower
from ...blip3o_core.models.siglip2 import Siglip2
from ...blip3o_core.pipelines.language import encode_prompts
from ...blip3o_core.prompts import PromptTokenizer
from .memory import TILED, memory_advice

HOST_LAYERS = {
    nn.Linear: comfy.ops.manual_cast.Linear,
    nn.Embedding: comfy.ops.manual_cast.Embedding,
    nn.Conv2d: comfy.ops.manual_cast.Conv2d,
    nn.Conv3d: comfy.ops.manual_cast.Conv3d,
    nn.GroupNorm: comfy.ops.manual_cast.GroupNorm,
    nn.LayerNorm: comfy.ops.manual_cast.LayerNorm,
    nn.RMSNorm: comfy.ops.manual_cast.RMSNorm,
}
LoadPatcher = Callable[[], ModelPatcher]
DECODE_BYTES = 2178  # activations per pixel in units of the dtype, as the host counts for its own autoencoder
IMAGE_TOKENS = 1024  # room for one image in a prompt; the published size takes 256
ACTIVATIONS_PER_TOKEN = 24  # peak activations of one decoder block in units of the hidden width, rounded up


class BiasedRMSNorm(comfy.ops.manual_cast.RMSNorm):
    """The host's has no bias; diffusers' may have one."""

    def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
        if self.weight is None:
            return nn.functional.rms_norm(x, self.normalized_shape, None, self.eps)
        weight, bias = comfy.ops.cast_bias_weight(self, x)
        normed = nn.functional.rms_norm(x, self.normalized_shape, weight, self.eps)
        return normed if bias is None else normed + bias


def use_host_layers(module: nn.Module) -> nn.Module:
    """Makes every layer of `module` one of the host's, in place: cast on use, streamed from system memory, cancellable."""
    for layer in module.modules():
        if type(layer) in HOST_LAYERS:
            layer.__class__ = HOST_LAYERS[type(layer)]
        elif isinstance(layer, DiffusersRMSNorm):
            layer.normalized_shape = tuple(layer.dim)
            layer.__class__ = BiasedRMSNorm
        elif hasattr(layer, "variance_epsilon"):  # transformers' RMS norm, a class of its own per model
            layer.eps = layer.variance_epsilon
            layer.normalized_shape = tuple(layer.weight.shape)
            layer.elementwise_affine = True
            layer.__class__ = comfy.ops.manual_cast.RMSNorm
        else:
            continue
        if not hasattr(layer, "bias"):
            layer.bias = None
    return module


def compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device computes in it, else float32; float16 overflows in these models."""
    return torch.bfloat16 if model_management.should_use_bf16(device) else torch.float32


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a network was loaded from, to tell whether a LoRA was trained on it."""

    fingerprint: str
    name: str  # of its folder


class HostedBackbone:
    """The language side of a checkpoint on its socket: ModelPatchers that the host loads, streams and frees, and the tokenizer.

    Satisfies `LanguageModels`, so prompts and conversations run the same code as headless. Vision tower and output head are
    read from the checkpoint when a node first needs them; clones share them.
    """

    def __init__(
        self, patcher: ModelPatcher, tokenizer: PromptTokenizer, load_vision: LoadPatcher, load_head: LoadPatcher, origin: Origin,
        image_side: int | None,
    ) -> None:  # fmt: skip
        self.patcher = patcher
        self.tokenizer = tokenizer
        self.origin = origin
        self.image_side = image_side
        self._vision_patcher, self._head_patcher = cache(load_vision), cache(load_head)
        self._memory_required = 0

    def with_patcher(self, patcher: ModelPatcher) -> "HostedBackbone":
        """The same with a clone of the patcher, which may carry patches. Neither vision tower nor output head is loaded twice."""
        clone = copy.copy(self)
        clone.patcher = patcher
        return clone

    @property
    def device(self) -> torch.device:
        """Where the host computes."""
        return self.patcher.load_device

    @property
    def dtype(self) -> torch.dtype:
        return compute_dtype(self.device)

    @property
    def context_tokens(self) -> int:
        return self.backbone.context_tokens

    @property
    def backbone(self) -> Backbone:
        return self.patcher.model

    @property
    def vision_tower(self) -> VisionTower:
        """Made resident beside the backbone whenever it is asked for, which is once per prompt or turn with images."""
        patcher = self._vision_patcher()
        self._make_resident(patcher)
        return patcher.model

    @property
    def output_head(self) -> nn.Module:
        """Made resident beside the backbone whenever it is asked for, which is once per answer."""
        patcher = self._head_patcher()
        self._make_resident(patcher)
        return patcher.model

    def load(self, tokens: int) -> None:
        """Asks the host to load the backbone, with room for the activations and cache of `tokens`."""
        width = self.backbone.latent_queries.shape[-1]
        self._memory_required = tokens * width * ACTIVATIONS_PER_TOKEN * self.dtype.itemsize
        self._make_resident()

    def encode_prompts(self, prompts: Sequence[str], **arguments) -> Tensor:
        """Prompts -> query states (B, 64, H) float32, on the host's intermediate device. Arguments of `language.encode_prompts`."""
        longest = self.context_tokens - 1 - self.backbone.num_queries
        for prompt in prompts:  # before weights move
            self.tokenizer.generation_ids(prompt, template=arguments.get("template", True), max_tokens=longest)
        images = sum(len(row) for row in arguments.get("images") or [])
        self.load(sum(map(len, prompts)) + self.backbone.num_queries + IMAGE_TOKENS * images)
        states = encode_prompts(self, prompts, max_tokens=longest, **arguments)
        return states.to(model_management.intermediate_device(), torch.float32)

    def _make_resident(self, *more: ModelPatcher) -> None:
        model_management.load_models_gpu([self.patcher, *more], memory_required=self._memory_required)


class HostedVisionEncoder:
    """EVA-CLIP, or the SigLIP2 of a SANA decoder, on its socket."""

    def __init__(self, patcher: ModelPatcher) -> None:
        self.patcher = patcher

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Images -> embeddings (B, C, 8, 8) float32, one image at a time, on the host's intermediate device."""
        pixel_values = siglip_pixel_values if self._is_siglip else eva_pixel_values
        return self._encode(pixel_values(list(images), size=self.patcher.model.config.image_size))

    def embed_null_image(self) -> Tensor:
        """What the decoder is guided away from (1, C, 8, 8): the zero pixel tensor, of SigLIP2 a black picture."""
        side = self.patcher.model.config.image_size
        return self._encode(torch.full((1, 3, side, side), -1.0 if self._is_siglip else 0.0))

    @property
    def _is_siglip(self) -> bool:
        return isinstance(self.patcher.model, Siglip2)

    def _encode(self, pixels: Tensor) -> Tensor:
        device = self.patcher.load_device
        dtype = compute_dtype(device)
        config = self.patcher.model.config
        tokens = (config.image_size // config.patch_size) ** 2
        model_management.load_models_gpu([self.patcher], memory_required=tokens * config.width * ACTIVATIONS_PER_TOKEN * dtype.itemsize)
        rows = []
        for image in pixels:
            model_management.throw_exception_if_processing_interrupted()
            rows.append(self.patcher.model(image[None].to(device, dtype)).float())
        return torch.cat(rows).to(model_management.intermediate_device())


class HostedAutoencoder(nn.Module):
    """diffusers' AutoencoderKL or AutoencoderDC with the two calls that the host's VAE makes; latents are unscaled on both sides."""

    def __init__(self, autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def decode(self, latents: Tensor) -> Tensor:
        with memory_advice("decoding the picture", TILED.format("Decode")):  # the host then tries tiles by itself
            return self.autoencoder.decode(latents).sample

    def encode(self, pixels: Tensor) -> Tensor:
        with memory_advice("encoding the picture", TILED.format("Encode")):
            encoded = self.autoencoder.encode(pixels)
        return encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()


def host_vae(autoencoder, *, factor: int) -> comfy.sd.VAE:
    """A native VAE around a diffusers autoencoder of any size (core's own has its group count built in, and there is no DC-AE in core).

    factor: pixels per latent cell, along each axis.

    `comfy.sd.VAE` builds its network itself, so it gets a throw-away one of a few kilobytes and then ours in its place.
    """
    stand_in = {"double_z": True, "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1],
                "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}  # fmt: skip
    params = {"embed_dim": 4, "ddconfig": stand_in}
    vae = comfy.sd.VAE(sd=comfy.ldm.models.autoencoder.AutoencoderKL(**params).state_dict(), config={"params": params})
    vae.first_stage_model = use_host_layers(HostedAutoencoder(autoencoder)).eval()
    vae.patcher = comfy.model_patcher.CoreModelPatcher(
        vae.first_stage_model, load_device=vae.device, offload_device=model_management.vae_offload_device()
    )
    vae.downscale_ratio = vae.upscale_ratio = factor
    vae.memory_used_decode = lambda shape, dtype: DECODE_BYTES * shape[2] * shape[3] * factor**2 * dtype.itemsize
    vae.latent_channels = autoencoder.config.latent_channels
    vae.size = None
    vae.model_size()
    return vae
