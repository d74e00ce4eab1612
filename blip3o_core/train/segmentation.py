"""First lessons for small models that see: what does each cell of the picture show, and where is it?

Qwen2.5-VL was pretrained on far more than conversations (arXiv:2502.13923, sec. 2.2); a model that starts from nothing learns little
from a few words about a whole picture. Maps of labels say something about every cell. Where the vision tower trains, its features
must tell the labels; where the language model trains, its states must, and the row and column too: the tower can't know them, for its
positions are relative. Where EVA-CLIP trains, the tokens of its embedding must. Where queries learn to draw, their states may have to
tell what each cell will show (objective.label_weight). The heads are thrown away afterwards.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.prepare import LABELS, Example
from ..pipelines.language import merged_grids
from .config import ObjectiveOptions
from .model import Objective, TrainingModel
from .noise import Draw, counted_positions

MAP_CHANNELS = 3  # of a map, which is read as RGB
CHANNELS = MAP_CHANNELS + 2  # with row and column


def segmentation_head(width: int) -> nn.Linear:
    """Features, states or tokens of an embedding -> logits of every label in every channel."""
    return nn.Linear(width, CHANNELS * LABELS)


def query_label_head(width: int) -> nn.Linear:
    """States of queries -> logits of every label in every channel of a map."""
    return nn.Linear(width, MAP_CHANNELS * LABELS)


def query_label_losses(logits: Tensor, examples: Sequence[Example], weight: Tensor | None = None) -> Tensor:
    """logits (B, 64, MAP_CHANNELS * LABELS) of the head, query i for cell i -> loss (B,); 0 for examples without a map.

    weight: (B, 64) of the cells, None for 1.
    """
    found = logits.new_zeros(len(examples), dtype=torch.float32)
    mapped = [index for index, example in enumerate(examples) if example.label_shares is not None]
    if not mapped:
        return found + 0 * logits.float().sum()
    shares = torch.stack([examples[index].label_shares.transpose(0, 1) for index in mapped]).to(found)  # (n, 64, channels, LABELS)
    own = logits[mapped].float().unflatten(-1, (MAP_CHANNELS, LABELS)).log_softmax(dim=-1)
    errors = -(shares * own).sum(dim=(2, 3))  # (n, 64)
    if weight is not None:
        errors = errors * weight[mapped]
    return found.index_add(0, torch.tensor(mapped, device=found.device), errors.mean(dim=1))


def segmentation_objective(options: ObjectiveOptions) -> Objective:
    """Cross-entropy with the share of each label in each cell, averaged over cells and summed over channels."""

    def losses(model: TrainingModel, examples: Sequence[Example], draws: Sequence[Draw]) -> Tensor:
        shares = [example.label_shares.transpose(0, 1) for example in examples]  # (cells, MAP_CHANNELS, LABELS) each
        if model.vision_encoder is not None:
            embeddings = model.vision_encoder(torch.stack([example.target_pixels for example in examples]).to(model.device))
            features = list(embeddings.flatten(2).transpose(1, 2))  # (64, C) each
        elif model.backbone is None:
            features = model.image_features(examples)  # (cells, H) each
        else:
            features = model.image_states(examples, counted_positions(draws, options.counted_positions))
            shares = [torch.cat((own, places(example)), dim=1) for own, example in zip(shares, examples, strict=True)]
        logits = model.segmentation_head(torch.cat(features)).float().unflatten(-1, (CHANNELS, LABELS))
        wanted = torch.cat(shares).to(logits)  # (all cells, channels, LABELS)
        found = -(wanted * logits[:, : wanted.shape[1]].log_softmax(dim=-1)).sum(dim=(1, 2))  # (all cells,)
        return torch.stack([own.mean() for own in found.split([len(own) for own in features])])

    return losses


def places(example: Example) -> Tensor:
    """Row and column of each cell of the picture (cells, 2, LABELS), as shares; from the last label on they are one."""
    [(_, rows, columns)] = merged_grids(example.grid_thw)
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)  # (rows, columns, 2)
    return F.one_hot(grid.flatten(0, 1).clamp(max=LABELS - 1), LABELS).float()
