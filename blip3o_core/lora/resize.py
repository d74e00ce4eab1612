"""Smaller LoRAs: the best approximation of each update with fewer ranks."""

from dataclasses import dataclass, replace

import torch

from ..errors import InputError
from .files import Adapter, LoraFile


@dataclass(frozen=True)
class Resized:
    """A smaller LoRA; `kept` is the share of the norm of all updates that is left, `kept_least` that of the worst layer, 0..1."""

    lora: LoraFile
    kept: float
    kept_least: float


def resize(lora: LoraFile, rank: int) -> Resized:
    """Brings every adapter with more than `rank` ranks down to it; alpha, dtype and magnitudes stay.

    Raises: InputError if `rank` is below 1 or above the highest rank of the file.
    """
    highest = max((adapter.rank for adapter in lora.all_adapters), default=0)
    if not 1 <= rank <= highest:
        raise InputError(f"rank {rank} is not in 1..{highest}, the highest rank of this LoRA. More ranks would only add zeros.")
    adapters, squares, least = {}, torch.zeros(2, dtype=torch.float64), 1.0
    for component, group in lora.adapters.items():
        adapters[component] = {}
        for path, adapter in group.items():
            small, kept, whole = truncated(adapter, rank)
            adapters[component][path] = small
            squares += torch.tensor([kept, whole], dtype=torch.float64) * adapter.scale**2
            least = min(least, (kept / whole) ** 0.5 if whole else 1.0)
    share = (squares[0] / squares[1]).sqrt().item() if squares[1] else 1.0
    ranks = sorted({adapter.rank for group in adapters.values() for adapter in group.values()})
    metadata = lora.metadata | {"blip3o.rank": ", ".join(map(str, ranks))}
    return Resized(replace(lora, adapters=adapters, metadata=metadata), share, least)


@torch.no_grad()
def truncated(adapter: Adapter, rank: int) -> tuple[Adapter, float, float]:
    """-> the adapter with at most `rank` ranks, squared norms of up @ down after and before.

    The singular values of up @ down are those of a rank x rank matrix between two orthonormal bases, so the large matrix is
    never made. Float32.
    """
    base_up, core_up = torch.linalg.qr(adapter.up.float())  # (out, r), (r, r)
    base_down, core_down = torch.linalg.qr(adapter.down.float().T)  # (in, r), (r, r)
    left, values, right = torch.linalg.svd(core_up @ core_down.T)
    squares = values.double().square()
    if adapter.rank <= rank:
        return adapter, squares.sum().item(), squares.sum().item()
    # alpha stays and alpha / rank grows, so one factor shrinks by as much
    up = base_up @ (left[:, :rank] * values[:rank].sqrt())
    down = (values[:rank].sqrt()[:, None] * right[:rank]) @ base_down.T * (rank / adapter.rank)
    small = replace(adapter, down=down.to(adapter.down.dtype), up=up.to(adapter.up.dtype))
    return small, squares[:rank].sum().item(), squares.sum().item()


@torch.no_grad()
def update_norm(adapter: Adapter) -> float:
    """Frobenius norm of alpha / rank * up @ down, without making that matrix."""
    up, down = adapter.up.double(), adapter.down.double()
    return abs(adapter.scale) * ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt().item()
