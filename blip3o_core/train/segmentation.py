"""First lessons for small vision towers: what does each cell of the picture show?

Qwen2.5-VL's tower was pretrained on far more than conversations (arXiv:2502.13923, sec. 2.2); one that starts from nothing learns
little from a few words about a whole picture. Maps of labels say something about every cell. The head is thrown away afterwards; only
the tower stays.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..data.prepare import LABELS, Example
from .config import ObjectiveOptions
from .model import Objective, TrainingModel
from .noise import Draw

CHANNELS = 3  # of a map, which is read as RGB


def segmentation_head(width: int) -> nn.Linear:
    """Features of the tower -> logits of every label in every channel."""
    return nn.Linear(width, CHANNELS * LABELS)


def segmentation_objective(options: ObjectiveOptions) -> Objective:
    """Cross-entropy with the share of each label in each cell, averaged over cells and summed over channels."""

    def losses(model: TrainingModel, examples: Sequence[Example], draws: Sequence[Draw]) -> Tensor:
        features = model.image_features(examples)  # (cells, H) each
        logits = model.segmentation_head(torch.cat(features)).float().unflatten(-1, (CHANNELS, LABELS))
        shares = torch.cat([example.label_shares.transpose(0, 1) for example in examples]).to(logits)  # (all cells, CHANNELS, LABELS)
        found = -(shares * logits.log_softmax(dim=-1)).sum(dim=(1, 2))  # (all cells,)
        return torch.stack([own.mean() for own in found.split([len(own) for own in features])])

    return losses
