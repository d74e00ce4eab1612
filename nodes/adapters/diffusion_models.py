"""The host's forward protocol around our networks: wrappers, block patches, its attention, its timesteps."""

import torch
from comfy import model_base, model_sampling
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ...blip3o_core.errors import InputError
from ...blip3o_core.models.nextdit import NextDiT, NextDiTConfig
from ...blip3o_core.sampling.flow_matching import truncate_timestep
from .hosting import Origin
from .memory import SMALLER_PICTURE, memory_advice

EMBEDDING_GRID = (8, 8)


class HostedNextDiT(NextDiT):
    """NextDiT with the signature of the host's diffusion models; module paths, and so LoRA keys, are unchanged."""

    def __init__(self, *, dtype: torch.dtype, device, operations, **sizes: int) -> None:
        super().__init__(NextDiTConfig(**sizes), dtype=dtype, device=device, operations=operations)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor = None, control=None, transformer_options=None, **kwargs) -> Tensor:
        """x (B, C, 8, 8), timesteps (B,) in 0..1000, context (B, 64, H) -> velocity (B, C, 8, 8)."""
        transformer_options = transformer_options or {}
        return WrapperExecutor.new_class_executor(
            self._denoise, self, get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options)
        ).execute(x, timesteps, context, transformer_options, **kwargs)

    def _denoise(self, x: Tensor, timesteps: Tensor, context: Tensor, transformer_options: dict, **kwargs) -> Tensor:
        self._require_embedding(x, context)
        replacements = transformer_options.get("patches_replace", {}).get("dit", {})

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return optimized_attention(q, k, v, self.config.num_heads, skip_reshape=True, skip_output_reshape=True,
                                       transformer_options=transformer_options)  # fmt: skip

        def run_layer(index: int, layer, hidden: Tensor) -> Tensor:
            replace = replacements.get(("double_block", index))
            if replace is None:
                return layer(hidden)
            block = {"original_block": lambda args: {"img": layer(args["img"])}}
            return replace({"img": hidden, "transformer_options": transformer_options}, block)["img"]

        return self.denoise(x, timesteps, self.encode_condition(context), attend=attend, run_layer=run_layer)

    def _require_embedding(self, x: Tensor, context: Tensor | None) -> None:
        if x.ndim != 4 or tuple(x.shape[1:]) != (self.config.in_channels, *EMBEDDING_GRID):
            raise InputError(f"the BLIP3-o diffusion model denoises embeddings of {self.config.in_channels} x 8 x 8, not a latent "
                             f"of {' x '.join(map(str, x.shape[1:]))}. Start from Empty BLIP3-o Embedding.")
        if context is None or context.shape[-1] != self.config.context_dim:
            found = "none" if context is None else f"width {context.shape[-1]}"
            raise InputError(f"the BLIP3-o diffusion model reads query states of width {self.config.context_dim}, the conditioning "
                             f"has {found}. Use BLIP3-o Text Encode with the backbone of the same checkpoint.")


class FlowModel(model_base.BaseModel):
    """NextDiT as the host's rectified-flow model, with the integer timesteps of the reference.

    Attributes:
        origin: its checkpoint; set by the loader. Every clone of the patcher has the same model, and so the same origin.
    """

    origin: Origin

    def __init__(self, model_config, device=None) -> None:
        super().__init__(model_config, model_type=model_base.ModelType.FLOW, device=device, unet_model=HostedNextDiT)

    def apply_model(self, *args, **kwargs) -> Tensor:
        with memory_advice("sampling embeddings", "Set a smaller batch_size in Empty BLIP3-o Embedding."):
            return super().apply_model(*args, **kwargs)

    def process_timestep(self, timestep: Tensor, **kwargs) -> Tensor:
        return truncate_timestep(timestep)


class LeadingEps(model_sampling.ModelSamplingDiscrete, model_sampling.EPS):
    """The host's noise prediction, but an empty latent starts from sqrt(sigma^2 + 1) * noise at every sigma.

    The schedule of the reference starts at timestep 981, below the largest sigma, and scales its noise so even there; the
    host does that only for the largest. A latent that holds something (img2img) is noised as the host does it.
    """

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return super().noise_scaling(sigma, noise, latent_image, max_denoise or not torch.count_nonzero(latent_image))


class SdxlDecoderModel(model_base.SDXL):
    """The host's SDXL with the decoder's own width of size embeddings and its way to start."""

    def __init__(self, model_config, device=None) -> None:
        super().__init__(model_config, model_type=model_base.ModelType.EPS, device=device)
        self.embedder = Timestep(model_config.size_embedding_width)
        self.model_sampling = LeadingEps(model_config)

    def apply_model(self, *args, **kwargs) -> Tensor:
        with memory_advice("drawing", SMALLER_PICTURE):
            return super().apply_model(*args, **kwargs)

    def encode_adm(self, **kwargs) -> Tensor:
        if kwargs.get("pooled_output") is None:
            raise InputError("the BLIP3-o decoder was given a conditioning that is not an embedding. Connect BLIP3-o Embedding to "
                             "Conditioning, positive and negative.")
        return super().encode_adm(**kwargs)
