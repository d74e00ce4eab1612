"""The SANA diffusion decoder (arXiv:2410.10629): SigLIP2 embedding -> pixels, on diffusers' transformer and DC-AE.

B batch, L = 64 embedding tokens, C their width, h x w latent grid, f = factor of the DC-AE (32 at full size).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..sampling.dpm_solver import FLOW_SHIFT, dpm_sigmas, dpm_timestep, sample_dpm_solver
from ..sampling.flow_matching import NUM_TRAIN_TIMESTEPS, flow_sigmas, sample_euler

OnStep = Callable[[int, int, Tensor], None]
"""(steps done, steps in all, latents (B, C, h, w)): progress; raise in it to cancel."""

SCHEDULERS = ("dpmsolver++", "euler")
"""How latents are sampled: as the checkpoint SigLIP2_SANA does, or as the later reconstruction code (flow matching without a shift)."""
POSITIONS = ("sincos", "none")
CONNECTOR_EPS = 1e-5


class Connector(nn.Sequential):
    """SigLIP2 features (B, L, C) -> SANA's captions (B, L, D)."""

    def __init__(self, width: int, caption_width: int) -> None:
        super().__init__(
            nn.Linear(width, caption_width), nn.GELU(approximate="tanh"), nn.Linear(caption_width, caption_width),
            nn.RMSNorm(caption_width, eps=CONNECTOR_EPS),
        )  # fmt: skip


class PositionedPatches(nn.Module):
    """Takes the place of diffusers' patch embedding: the same projection, with or without the table that SANA was first run with.

    diffusers before 0.33 always added the table, later versions never do for SANA's configuration; the file doesn't tell.
    """

    def __init__(self, proj: nn.Module, *, trained_side: int, positions: bool) -> None:
        super().__init__()
        self.proj = proj
        self.trained_side = trained_side
        self.positions = positions

    def forward(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> tokens (B, h * w, W)."""
        patches = self.proj(latents)
        tokens = patches.flatten(2).transpose(1, 2)
        if not self.positions:
            return tokens
        table = sincos_table(*patches.shape[2:], tokens.shape[-1], self.trained_side)
        return tokens + table.to(device=tokens.device, dtype=tokens.dtype)


def sincos_table(height: int, width: int, channels: int, trained_side: int) -> Tensor:
    """(height * width, channels) float64, row-major: of the column, then of the row, sines and cosines; a grid is scaled to the trained."""
    frequencies = 10000.0 ** -(torch.arange(channels // 4, dtype=torch.float64) / (channels // 4))

    def waves(length: int) -> Tensor:
        angles = (torch.arange(length, dtype=torch.float64) * (trained_side / length))[:, None] * frequencies
        return torch.cat((angles.sin(), angles.cos()), dim=1)  # (length, channels / 2)

    rows, columns = waves(height)[:, None].expand(-1, width, -1), waves(width)[None].expand(height, -1, -1)
    return torch.cat((columns, rows), dim=2).flatten(0, 1)


class SanaDecoder(nn.Module):
    """Attributes: `connector`, `transformer` (SanaTransformer2DModel), `vae` (AutoencoderDC without its encoder), `scheduler`."""

    def __init__(self, connector: Connector, transformer, vae, *, scheduler: str, flow_shift: float = FLOW_SHIFT) -> None:
        super().__init__()
        self.connector = connector
        self.transformer = transformer
        self.vae = vae
        self.scheduler = scheduler
        self.flow_shift = flow_shift

    @property
    def embedding_width(self) -> int:
        """C of the embeddings this decoder reads."""
        return self.connector[0].in_features

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each axis."""
        return vae_factor(self.vae.config)

    def sample_latents(
        self, embeddings: Tensor, negative: Tensor | None, noise: Tensor, *, steps: int, guidance_scale: float,
        width: int = 0, height: int = 0, on_step: OnStep | None = None,
    ) -> Tensor:  # fmt: skip
        """Denoises by DPM-Solver++, or by Euler, as the code of the checkpoint's layout.

        Args:
            embeddings: (B, L, C) condition. negative: (B, L, C), read only if guidance_scale > 1: the black picture's.
            noise: (B, c, h, w) standard normal.
            width, height: not used; the grid of the noise says them.
        Returns: (B, c, h, w) float32 latents, times the scaling factor of the DC-AE.
        """
        guided = guidance_scale > 1
        context = torch.cat((negative, embeddings)) if guided else embeddings  # the published order: null first
        context = self.connector(context.to(self.connector[0].weight.dtype))

        def velocity(x: Tensor, timestep: Tensor) -> Tensor:
            x = x.to(context.dtype)
            x = torch.cat((x, x)) if guided else x
            timestep = timestep.to(device=x.device, dtype=torch.float32).expand(len(x))
            v = self.transformer(x, encoder_hidden_states=context, timestep=timestep, return_dict=False)[0].float()
            if not guided:
                return v
            v_null, v_condition = v.chunk(2)
            return v_null + guidance_scale * (v_condition - v_null)

        noise = noise.float()
        if self.scheduler == "euler":
            return sample_euler(lambda x, sigma: velocity(x, sigma * NUM_TRAIN_TIMESTEPS), noise, flow_sigmas(steps), on_step)
        sigmas = dpm_sigmas(steps, self.flow_shift)
        return sample_dpm_solver(lambda x, sigma: velocity(x, dpm_timestep(sigma)), noise, sigmas, on_step)

    def decode_latents(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> pixels (B, 3, h * f, w * f) float32 in 0..1; one image at a time, which bounds memory."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        pixels = torch.cat([self.vae.decode(row[None], return_dict=False)[0].float() for row in scaled])
        return (pixels / 2 + 0.5).clamp(0, 1)


def vae_factor(config: Mapping[str, Any]) -> int:
    """Pixels per latent cell of an AutoencoderDC: every level but the last halves the grid."""
    return 2 ** (len(config["decoder_block_out_channels"]) - 1)
