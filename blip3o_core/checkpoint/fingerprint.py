"""Which weights these are, without reading them all."""

import hashlib
from collections.abc import Mapping

import torch

from .shards import TensorEntry, read_tensor

DIGITS = 16
SMALL_BYTES = 2**20  # norms, biases and gates; matrices are told apart by the norms trained with them


def tensors_fingerprint(entries: Mapping[str, TensorEntry]) -> str:
    """16 hex digits from names, shapes and, of one-dimensional tensors, the values in bfloat16.

    Vectors are never quantised, so a copy in another precision keeps its fingerprint; any fine-tuning that trains them changes it.
    """
    digest = hashlib.sha256()
    for name in sorted(entries):
        entry = entries[name]
        digest.update(f"{name} {entry.shape}\n".encode())
        if len(entry.shape) == 1 and entry.nbytes <= SMALL_BYTES:
            digest.update(read_tensor(entry, dtype=torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:DIGITS]
