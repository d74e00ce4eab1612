"""VAE training for small models: pictures through a narrow latent and back (arXiv:2112.10752, without the adversarial part)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.prepare import Example
from .config import ObjectiveOptions
from .model import Objective, TrainingModel
from .noise import Draw

KL_WEIGHT = 1e-6


def autoencoding_objective(options: ObjectiveOptions) -> Objective:
    """Absolute plus squared error of the pixels, and a small pull of the latents towards the normal distribution."""

    def losses(model: TrainingModel, examples: Sequence[Example], draws: Sequence[Draw]) -> Tensor:
        pictures = torch.stack([example.picture for example in examples]).to(model.device)
        posterior = model.vae.encode(pictures).latent_dist
        noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=draw.generator()) for draw in draws])
        decoded = model.vae.decode(posterior.mean + posterior.std * noise.to(posterior.mean)).sample.float()
        error = decoded - pictures
        pixels = error.abs().flatten(1).mean(dim=1) + error.square().flatten(1).mean(dim=1)
        return pixels + KL_WEIGHT * posterior.kl()

    return losses
