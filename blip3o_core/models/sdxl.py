"""The SDXL-shaped diffusion decoder (Emu2's visual decoder): CLIP embedding -> pixels, on diffusers' UNet and VAE.

B batch, L = 64 embedding tokens, C their width, h x w latent grid, f = VAE factor (8 at full size).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SCHEDULERS = ("euler", "dpmsolver++")
"""euler is the reference's. dpmsolver++ is second order (arXiv:2211.01095), in steps that are even in the logarithm of the noise."""
FEWER_STEPS = 25
"""Of dpmsolver++: as close to the exact solution as 50 of euler, see docs/sampling.md."""
ORIGINAL_SIZE = (1024, 1024)  # (height, width) that every picture claims to come from; only the target size varies

NOISE_LEVELS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
"""What schedulers of diffusers understand alike."""

OnStep = Callable[[int, int, Tensor], None]
"""(steps done, steps in all, latents (B, 4, h, w)): progress; raise in it to cancel."""


class SdxlDecoder(nn.Module):
    """Attributes: `unet` (UNet2DConditionModel), `vae` (AutoencoderKL without encoder), `scheduler_config`, `scheduler` of SCHEDULERS."""

    def __init__(self, unet, vae, scheduler_config: Mapping[str, Any], scheduler: str = SCHEDULERS[0]) -> None:
        super().__init__()
        self.scheduler = scheduler
        self.unet = unet
        self.vae = vae
        self.scheduler_config = scheduler_config

    @property
    def embedding_width(self) -> int:
        """C of the embeddings this decoder reads."""
        return self.unet.config.cross_attention_dim

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each axis."""
        return vae_factor(self.vae.config)

    def sample_latents(
        self, embeddings: Tensor, negative: Tensor | None, noise: Tensor, *, steps: int, guidance_scale: float,
        width: int, height: int, on_step: OnStep | None = None,
    ) -> Tensor:  # fmt: skip
        """Takes the predicted noise away with the solver `scheduler`, over the noise levels of the checkpoint's scheduler configuration.

        Args:
            embeddings: (B, L, C) condition. negative: (B, L, C), read only if guidance_scale > 1.
            noise: (B, 4, h, w) standard normal; scaled here.
            width, height: target size in pixels that the UNet is told; the grid is that of the noise.
        Returns: (B, 4, h, w) float32 latents, before division by the VAE's scaling factor.
        """
        guided = guidance_scale > 1
        scheduler = make_scheduler(self.scheduler, self.scheduler_config)
        scheduler.set_timesteps(steps, device=noise.device)
        context = torch.cat((embeddings, negative)) if guided else embeddings  # the published order: condition first
        context = context.to(self.unet.dtype)
        time_ids = torch.tensor([[*ORIGINAL_SIZE, 0, 0, height, width]], dtype=context.dtype, device=context.device)
        added = {"text_embeds": context.mean(dim=1), "time_ids": time_ids.expand(len(context), -1)}

        latents = noise.float() * scheduler.init_noise_sigma
        for index, timestep in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(latents, timestep).to(self.unet.dtype)
            scaled = torch.cat((scaled, scaled)) if guided else scaled
            predicted = self.unet(scaled, timestep, encoder_hidden_states=context, added_cond_kwargs=added).sample.float()
            if guided:
                conditional, unconditional = predicted.chunk(2)
                predicted = unconditional + guidance_scale * (conditional - unconditional)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
            if on_step is not None:
                on_step(index + 1, steps, latents)
        return latents

    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) -> pixels (B, 3, h * f, w * f) float32 in 0..1; one image at a time, which bounds memory."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixels = torch.cat([self.vae.decode(row[None]).sample.float() for row in scaled])
        return (pixels / 2 + 0.5).clamp(0, 1)


def make_scheduler(name: str, config: Mapping[str, Any]):
    """diffusers' scheduler of SCHEDULERS, from the configuration of an EulerDiscreteScheduler."""
    from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler

    if name == "euler":
        return EulerDiscreteScheduler.from_config(dict(config))
    shared = {key: config[key] for key in NOISE_LEVELS if key in config}
    return DPMSolverMultistepScheduler(**shared, algorithm_type="dpmsolver++", solver_order=2, use_lu_lambdas=True)


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent cell of an AutoencoderKL: every level but the last halves the grid."""
    return 2 ** (len(config["block_out_channels"]) - 1)
