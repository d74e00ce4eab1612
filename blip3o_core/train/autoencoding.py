"""VAE training for small models: pictures through a narrow latent and back (arXiv:2112.10752, without the adversarial part)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.prepare import Example
from .config import ObjectiveOptions
from .model import Objective, TrainingModel
from .noise import Draw

KL_WEIGHT = 1e-6


def thumbnail_head(latent_channels: int) -> nn.Conv2d:
    """Latents -> red, green and blue of what each of them stands for. Thrown away afterwards."""
    return nn.Conv2d(latent_channels, 3, kernel_size=1)


def autoencoding_objective(options: ObjectiveOptions) -> Objective:
    """Absolute plus squared error of the pixels, and a small pull of the latents towards the normal distribution.

    With `thumbnail_weight` a linear map must find the picture's thumbnail in the latents: a small VAE otherwise may tell colours by
    patterns of a single channel, which a decoder hardly learns to draw.
    """

    def losses(model: TrainingModel, examples: Sequence[Example], draws: Sequence[Draw]) -> Tensor:
        pictures = torch.stack([example.picture for example in examples]).to(model.device)
        posterior = model.vae.encode(pictures).latent_dist
        noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=draw.generator()) for draw in draws])
        deviation = (posterior.var + (options.latent_noise / model.vae.config.scaling_factor) ** 2).sqrt()
        decoded = model.vae.decode(posterior.mean + deviation * noise.to(posterior.mean)).sample.float()
        error = decoded - pictures
        pixels = error.abs().flatten(1).mean(dim=1) + error.square().flatten(1).mean(dim=1)
        found = pixels + KL_WEIGHT * posterior.kl()
        if options.thumbnail_weight:
            thumbnails = F.adaptive_avg_pool2d(pictures, posterior.mean.shape[-2:])
            error = model.thumbnail_head(posterior.mean).float() - thumbnails
            found = found + options.thumbnail_weight * error.square().flatten(1).mean(dim=1)
        return found

    return losses
