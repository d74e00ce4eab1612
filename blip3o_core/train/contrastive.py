"""CLIP training for small models: EVA-CLIP and a text tower learn to find each other's picture and caption in the batch.

Source: CLIP, arXiv:2103.00020. The published tower was pretrained by masked image modelling first, which keeps the detail that a
decoder needs; a linear reconstruction of the pixels stands in for that here (objective.pixel_weight). The text tower and all
projections are thrown away afterwards; only the features stay.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.prepare import Example
from .config import ObjectiveOptions
from .model import Objective, TrainingModel
from .noise import Draw

WIDTH, HEADS, LAYERS, CONTEXT = 128, 4, 2, 128
SHARED_WIDTH = 128
START_SCALE, MAX_SCALE = 1 / 0.07, 100.0


class TextTower(nn.Module):
    """A small bidirectional transformer over token ids, and the projections out of both towers."""

    def __init__(self, vocabulary_size: int, embedding_width: int, block_side: int = 0) -> None:
        """block_side: pixels along each axis that one embedding token stands for; 0 makes no projection to pixels."""
        super().__init__()
        self.tokens = nn.Embedding(vocabulary_size, WIDTH)
        self.positions = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.text_projection = nn.Linear(WIDTH, SHARED_WIDTH, bias=False)
        self.image_projection = nn.Linear(embedding_width, SHARED_WIDTH, bias=False)
        self.pixel_projection = nn.Linear(embedding_width, 3 * block_side**2) if block_side else None
        self.log_scale = nn.Parameter(torch.tensor(math.log(START_SCALE)))

    def forward(self, ids: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of each caption -> unit vectors (B, shared)."""
        rows = [list(row[:CONTEXT]) or [0] for row in ids]
        longest, device = max(map(len, rows)), self.positions.device
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)  # (B, N)
        padding = torch.tensor([[False] * len(row) + [True] * (longest - len(row)) for row in rows], device=device)
        hidden = self.layers(self.tokens(padded) + self.positions[:longest], src_key_padding_mask=padding)
        kept = (~padding).to(hidden)[..., None]
        return F.normalize(self.text_projection((hidden * kept).sum(dim=1) / kept.sum(dim=1)).float(), dim=-1)

    def project_images(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, C, 8, 8) -> unit vectors (B, shared)."""
        return F.normalize(self.image_projection(embeddings.flatten(2).mean(dim=2)).float(), dim=-1)

    def project_pixels(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, C, h, w) -> pixels (B, 3, h * side, w * side), each block from its own token."""
        blocks = self.pixel_projection(embeddings.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, 3 * side * side, h, w)
        return F.pixel_shuffle(blocks, math.isqrt(blocks.shape[1] // 3))

    @property
    def scale(self) -> Tensor:
        """Inverse temperature, bounded as in CLIP."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)


def distance_from_white(embeddings: Tensor) -> Tensor:
    """Embeddings (B, C, h, w) -> squared distance of their second moments over all tokens from the identity, per channel: scalar.

    Flow matching adds noise of deviation 1 to every channel alike. Where a few directions hold nearly all of the variance, as they do
    without this, detail in the others drowns in it. The idea is VICReg's (arXiv:2105.04906).
    What all pictures have in common at a place, and all places of a picture, is taken away first: whitened with it, 82 % of nano's
    embeddings were position and background, and a DiT learned to draw these and no objects.
    """
    own = embeddings - embeddings.mean(dim=0)
    own = own - own.mean(dim=(2, 3), keepdim=True)
    tokens = own.permute(0, 2, 3, 1).flatten(0, 2)  # (B * h * w, C)
    moments = tokens.T @ tokens / len(tokens)
    return (moments - torch.eye(len(moments), device=moments.device)).square().sum() / len(moments)


def contrastive_objective(options: ObjectiveOptions) -> Objective:
    """Cross-entropy of each picture against all captions of the batch and the other way round. Depends on the whole batch."""

    def losses(model: TrainingModel, examples: Sequence[Example], draws: Sequence[Draw]) -> Tensor:
        pixels = torch.stack([example.target_pixels for example in examples]).to(model.device)
        embeddings = model.vision_encoder(pixels)  # (B, C, 8, 8)
        images = model.text_tower.project_images(embeddings)  # (B, shared)
        texts = model.text_tower([example.ids for example in examples])
        logits = model.text_tower.scale * images @ texts.T  # (B, B)
        same = torch.tensor([[a.ids == b.ids for b in examples] for a in examples], device=logits.device)
        wanted = same.to(logits) / same.sum(dim=1, keepdim=True)  # equal captions are equally right
        found = (F.cross_entropy(logits, wanted, reduction="none") + F.cross_entropy(logits.T, wanted, reduction="none")) / 2
        if options.pixel_weight:
            error = (model.text_tower.project_pixels(embeddings).float() - pixels).square().flatten(1).mean(dim=1)
            found = found + options.pixel_weight * error
        if options.whitening_weight:
            found = found + options.whitening_weight * distance_from_white(embeddings.float())
        return found

    return losses
