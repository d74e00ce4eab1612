"""Which weights these are, without reading them all."""

import hashlib
from collections.abc import Mapping

import torch

from .shards import TensorEntry, map_tensor

DIGITS = 16
SAMPLED = 256  # values of a matrix that are read: a merged LoRA changes matrices alone, and all of their values


def tensors_fingerprint(entries: Mapping[str, TensorEntry]) -> str:
    """16 hex digits from names, shapes and the values in bfloat16: of vectors all, of other tensors the first ones.

    A copy in float32 keeps its fingerprint, a quantised one doesn't.
    """
    digest = hashlib.sha256()
    for name in sorted(entries):
        entry = entries[name]
        digest.update(f"{name} {entry.shape}\n".encode())
        values = map_tensor(entry).flatten()[: None if len(entry.shape) == 1 else SAMPLED]  # mapped: the rest is not read
        digest.update(values.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:DIGITS]
