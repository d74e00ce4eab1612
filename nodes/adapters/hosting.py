"""transformers and diffusers modules under the host's memory management."""

from collections.abc import Sequence

import comfy.ldm.models.autoencoder
import comfy.model_management as model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from torch import Tensor, nn

from ...blip3o_core.models.qwen2_5_vl import QueryEncoder
from ...blip3o_core.models.sdxl import vae_factor
from ...blip3o_core.prompts import PromptTokenizer

HOST_LAYERS = {
    nn.Linear: comfy.ops.manual_cast.Linear,
    nn.Embedding: comfy.ops.manual_cast.Embedding,
    nn.Conv2d: comfy.ops.manual_cast.Conv2d,
    nn.GroupNorm: comfy.ops.manual_cast.GroupNorm,
    nn.LayerNorm: comfy.ops.manual_cast.LayerNorm,
}
ACTIVATIONS_PER_TOKEN = 24  # peak activations of one decoder block in units of the hidden width, rounded up


def use_host_layers(module: nn.Module) -> nn.Module:
    """Makes every layer of `module` one of the host's, in place: cast on use, streamed from system memory, cancellable."""
    for layer in module.modules():
        if type(layer) in HOST_LAYERS:
            layer.__class__ = HOST_LAYERS[type(layer)]
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


class HostedBackbone:
    """The language backbone on its socket: a ModelPatcher that the host loads, streams and frees, and the tokenizer."""

    def __init__(self, patcher: comfy.model_patcher.ModelPatcher, tokenizer: PromptTokenizer) -> None:
        self.patcher = patcher
        self.tokenizer = tokenizer

    @property
    def query_encoder(self) -> QueryEncoder:
        return self.patcher.model

    def encode_prompts(self, prompts: Sequence[str], *, template: bool) -> Tensor:
        """Prompts -> query states (B, 64, H) float32, on the host's intermediate device. Raises InputError."""
        rows = [self.tokenizer.generation_ids(prompt, template=template, max_tokens=self.query_encoder.max_tokens)
                for prompt in prompts]  # fmt: skip
        device = self.patcher.load_device
        dtype = torch.bfloat16 if model_management.should_use_bf16(device) else torch.float32
        width = self.query_encoder.latent_queries.shape[-1]
        tokens = len(rows) * (max(map(len, rows)) + self.query_encoder.latent_queries.shape[1])
        model_management.load_models_gpu([self.patcher], memory_required=tokens * width * ACTIVATIONS_PER_TOKEN * dtype.itemsize)
        return self.query_encoder(rows, device=device, dtype=dtype).to(model_management.intermediate_device(), torch.float32)


class HostedAutoencoder(nn.Module):
    """diffusers' AutoencoderKL with the two calls that the host's VAE makes; latents are unscaled on both sides."""

    def __init__(self, autoencoder) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def decode(self, latents: Tensor) -> Tensor:
        return self.autoencoder.decode(latents).sample

    def encode(self, pixels: Tensor) -> Tensor:
        return self.autoencoder.encode(pixels).latent_dist.mode()


def host_vae(autoencoder) -> comfy.sd.VAE:
    """A native VAE around diffusers' AutoencoderKL of any size (core's own has its group count built in).

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
    vae.downscale_ratio = vae.upscale_ratio = vae_factor(autoencoder.config)
    vae.latent_channels = autoencoder.config.latent_channels
    vae.size = None
    vae.model_size()
    return vae
