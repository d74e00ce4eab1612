"""Arithmetic on CLIP embeddings: meanings between, blends of several, and "this, but as that differs from the other".

Embeddings are used raw by every stage, so all of it is linear; results stay near what the decoder knows while weights stay near
0..1. Shapes (B, C, 8, 8); a batch of 1 serves every row of the others.
"""

from collections.abc import Sequence

from torch import Tensor

from .errors import InputError


def interpolate(a: Tensor, b: Tensor, weight: float) -> Tensor:
    """a at weight 0, b at weight 1; outside of 0..1 it extrapolates."""
    return mix([a, b], [1 - weight, weight])


def mix(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum, weights scaled to sum 1. Raises InputError for other shapes, or weights that cancel out."""
    if not embeddings or len(embeddings) != len(weights):
        raise InputError(f"{len(embeddings)} embeddings and {len(weights)} weights; pass one weight per embedding.")
    require_same_kind(embeddings)
    total = sum(weights)
    if abs(total) < 1e-6:
        raise InputError(f"the weights {list(weights)} sum to 0. Give weights with a positive sum.")
    return sum(embedding * (weight / total) for embedding, weight in zip(embeddings, weights, strict=True))


def add_difference(a: Tensor, plus: Tensor, minus: Tensor, weight: float = 1.0) -> Tensor:
    """a + weight * (plus - minus): for instance a house, plus a night street, minus the same street by day."""
    require_same_kind([a, plus, minus])
    return a + weight * (plus - minus)


def require_same_kind(embeddings: Sequence[Tensor]) -> None:
    """Raises InputError unless all have one width and grid, and batches that fit."""
    shapes = [tuple(embedding.shape) for embedding in embeddings]
    batches = {shape[0] for shape in shapes} - {1}
    if len({shape[1:] for shape in shapes}) != 1 or len(batches) > 1:
        raise InputError(f"embeddings of shapes {', '.join(map(str, shapes))} can't be combined. Make all with the same BLIP3-o "
                         "model, in batches of one size or of 1.")
