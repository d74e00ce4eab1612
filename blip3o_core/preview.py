"""A picture of an embedding that has no pixels: its three principal components as a small colour map."""

import torch
import torch.nn.functional as F
from torch import Tensor

PREVIEW_SIDE = 256


def principal_component_map(z: Tensor, side: int = PREVIEW_SIDE) -> Tensor:
    """(B, C, h, w) -> (B, 3, side, side) in -1..1, dtype kept: the directions in which the tokens of each image differ most.

    Signs are fixed by the largest coordinate, so colours don't flip between the steps of one run.
    """
    tokens = z.flatten(2).transpose(1, 2).float()  # (B, N, C)
    tokens = tokens - tokens.mean(dim=1, keepdim=True)
    gram = tokens @ tokens.transpose(1, 2)  # (B, N, N): N is 64, far below C
    values, vectors = torch.linalg.eigh(gram.cpu())  # ascending
    components = vectors[..., -3:].flip(-1) * values[..., -3:].flip(-1).clamp(min=0).sqrt()[:, None]  # (B, N, 3)
    peak = components.gather(1, components.abs().argmax(dim=1, keepdim=True))  # (B, 1, 3), signed
    components = components / torch.where(peak == 0, 1, peak)  # in -1..1, largest coordinate at +1
    grid = components.transpose(1, 2).unflatten(2, z.shape[-2:])  # (B, 3, h, w)
    return F.interpolate(grid, size=(side, side), mode="bilinear").to(device=z.device, dtype=z.dtype)
