"""The SANA decoder as the host's diffusion model: diffusers' transformer and BLIP3-o's connector, without a line of SANA in the host."""

from collections.abc import Callable

import torch
from comfy import model_base
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

from ...blip3o_core.errors import InputError
from ...blip3o_core.models.sana import Connector
from ...blip3o_core.sampling.flow_matching import truncate_timestep
from .hosting import use_host_layers
from .memory import SMALLER_PICTURE, memory_advice


class HostedSana(nn.Module):
    """Connector and transformer with the signature of the host's diffusion models; built without memory, weights are assigned later."""

    def __init__(
        self, *, make_connector: Callable[[], Connector], make_transformer: Callable[[], nn.Module], dtype: torch.dtype, device, operations
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.connector = make_connector()
        self.transformer = make_transformer()
        use_host_layers(self.to(dtype))

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor = None, control=None, transformer_options=None, **kwargs) -> Tensor:
        """x (B, c, h, w), timesteps (B,) in 0..1000, context (B, 64, C) -> velocity (B, c, h, w)."""
        return WrapperExecutor.new_class_executor(
            self._denoise, self, get_all_wrappers(WrappersMP.DIFFUSION_MODEL, transformer_options or {})
        ).execute(x, timesteps, context)

    def _denoise(self, x: Tensor, timesteps: Tensor, context: Tensor | None, *_, **__) -> Tensor:
        width = self.connector[0].in_features
        if context is None or context.shape[-1] != width:
            found = "none" if context is None else f"width {context.shape[-1]}"
            raise InputError(f"the SANA decoder draws SigLIP2 embeddings of width {width}, the conditioning has {found}. Encode a picture "
                             "with the vision encoder of the same folder (Load BLIP3-o Vision Encoder, BLIP3-o Image Encode).")
        return self.transformer(x, encoder_hidden_states=self.connector(context), timestep=timesteps.float(), return_dict=False)[0]


class SanaDecoderModel(model_base.BaseModel):
    """The host's rectified flow; DPM-Solver++ of the reference tells the network integer timesteps, its Euler doesn't."""

    def __init__(self, model_config, device=None) -> None:
        super().__init__(model_config, model_type=model_base.ModelType.FLOW, device=device, unet_model=HostedSana)
        self.truncates = model_config.truncates

    def apply_model(self, *args, **kwargs) -> Tensor:
        with memory_advice("drawing", SMALLER_PICTURE):
            return super().apply_model(*args, **kwargs)

    def process_timestep(self, timestep: Tensor, **kwargs) -> Tensor:
        return truncate_timestep(timestep) if self.truncates else timestep
