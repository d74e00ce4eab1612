"""Decoder training: the SDXL-shaped UNet learns to predict the noise in the latents of a picture, given the picture's embedding.

The reference trains its SANA decoder this way (condition replaced by that of a null picture with probability 0.1); for the UNet its
schedule and its conditioning are those of sampling: see models/sdxl.py.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from ..data.prepare import Example
from ..models.sdxl import ORIGINAL_SIZE
from ..sampling.discrete_euler import NUM_TRAIN_TIMESTEPS, signal_rates
from .config import ObjectiveOptions
from .local_attention import local_attention
from .model import Objective, TrainingModel
from .noise import Draw, condition_noise, flow_draws, repeated


def denoising_timesteps(u: Tensor) -> Tensor:
    """u (B,) in [0, 1) -> timestep (B,) in 0..999; large u is little noise, as in flow matching."""
    return NUM_TRAIN_TIMESTEPS - 1 - (u * NUM_TRAIN_TIMESTEPS).long()


def denoising_objective(options: ObjectiveOptions) -> Objective:
    """Squared error of the predicted noise at one timestep per draw, averaged over the latents, weighted by `noisy_weight`."""

    def losses(model: TrainingModel, examples: Sequence[Example], draws: Sequence[Draw]) -> Tensor:
        pictures = torch.stack([example.picture for example in examples])
        latents = model.frozen.latents(pictures)  # (B, 4, h, w) float32
        embeddings = model.targets(examples)  # (B, C, 8, 8)
        draws = repeated(draws, options.draws_per_sample)
        rounds = len(draws) // len(examples)
        latents, embeddings = latents.repeat(rounds, 1, 1, 1), embeddings.repeat(rounds, 1, 1, 1)
        drawn = flow_draws(draws, latents.shape[1:], timesteps=options.timesteps, logit_mean=options.logit_mean,
                           logit_std=options.logit_std, condition_dropout=options.condition_dropout)  # fmt: skip
        if options.embedding_noise:
            embeddings = embeddings + condition_noise(draws, embeddings.shape[1:], options.embedding_noise).to(embeddings)
        if not drawn.kept.all():
            kept = drawn.kept.to(embeddings)[:, None, None, None]
            embeddings = kept * embeddings + (1 - kept) * model.frozen.zero_embedding()
        timestep = denoising_timesteps(drawn.u).to(latents.device)  # (B,)
        rate = signal_rates().to(latents.device)[timestep][:, None, None, None]
        noise = drawn.noise.to(latents)
        noisy = rate.sqrt() * latents + (1 - rate).sqrt() * noise
        with local_attention(model.unet, *noisy.shape[-2:]) if options.local_attention_weight else nullcontext([]) as looked:
            predicted = predict_noise(model.unet, noisy, timestep, embeddings, pictures.shape[-2:])
        error = (predicted.float() - noise).square().flatten(1).mean(dim=1)
        # The error of the velocity is that of the noise divided by the signal's share (arXiv:2202.00512), where pictures take shape.
        weighted = error / rate.flatten().clamp(min=1 / options.noisy_weight)
        if looked:
            weighted = weighted + options.local_attention_weight * torch.stack(looked).mean(dim=0)
        return weighted.unflatten(0, (rounds, -1)).mean(dim=0)

    return losses


def predict_noise(unet, noisy: Tensor, timestep: Tensor, embeddings: Tensor, size: tuple[int, int]) -> Tensor:
    """noisy (B, 4, h, w), timestep (B,), embeddings (B, C, 8, 8), size (height, width) of the picture -> noise (B, 4, h, w)."""
    context = embeddings.flatten(2).transpose(1, 2)  # (B, 64, C)
    time_ids = torch.tensor([[*ORIGINAL_SIZE, 0, 0, *size]], dtype=context.dtype, device=context.device)
    added = {"text_embeds": context.mean(dim=1), "time_ids": time_ids.expand(len(context), -1)}
    return unet(noisy, timestep, encoder_hidden_states=context, added_cond_kwargs=added).sample
