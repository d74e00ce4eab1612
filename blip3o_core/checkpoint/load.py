"""Fills a network that was built on the meta device, tensor by tensor, from its files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..errors import CheckpointError
from .report import require_matching
from .shards import TensorEntry, is_quantised, read_tensor
from .streaming import stream_layers

OnLoad = Callable[[str, int, int], None]
"""(component, bytes read, bytes in all), called after each tensor."""

Module = TypeVar("Module", bound=nn.Module)


def expected_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of everything a checkpoint must hold for `module`."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}


def fill(
    module: Module, entries: Mapping[str, TensorEntry], *, component: str, source: Path, dtype: torch.dtype | None,
    device: torch.device | str = "cpu", on_load: OnLoad | None = None, stream: bool = False,
) -> Module:  # fmt: skip
    """Replaces every meta parameter of `module` by its tensor, in `dtype` (None: as stored) on `device`; returns it frozen, in eval mode.

    Args:
        module: built under `torch.device("meta")`; its state-dict names are the keys of `entries`.
        component, source: how messages call the network and where its tensors come from.
        stream: large weights are not read now, but by each layer when it runs.
    Raises: CheckpointError before anything is read if names or shapes differ, and at the first tensor that is not finite.
    """
    require_matching(component, source, expected_shapes(module), entries)
    stored = entries
    if stream:
        streamed = set(stream_layers(module, entries, dtype=dtype, device=torch.device(device)))
        entries = {name: entry for name, entry in entries.items() if name not in streamed}
    total = sum(entry.nbytes for entry in entries.values())
    done = 0
    for name, entry in entries.items():
        place(module, name, entry, read_tensor(entry, dtype=None if is_quantised(name, stored) else dtype, device=device))
        done += entry.nbytes
        if on_load is not None:
            on_load(component, done, total)
    return module.eval()


def place(module: nn.Module, name: str, entry: TensorEntry, tensor: torch.Tensor) -> None:
    """Makes `tensor` the frozen parameter `name` of `module`. Raises CheckpointError if it is not finite."""
    require_finite(entry, tensor)
    owner = module.get_submodule(name.rpartition(".")[0])
    setattr(owner, name.rpartition(".")[2], nn.Parameter(tensor, requires_grad=False))


def require_finite(entry: TensorEntry, tensor: torch.Tensor) -> None:
    """Raises CheckpointError if `tensor` holds nan or infinity (a broken download or an overflow in a conversion)."""
    if tensor.dtype.itemsize == 1:  # quantised: their scales are checked
        return
    if tensor.numel() and not all(torch.isfinite(bound) for bound in torch.aminmax(tensor)):  # nan spreads to both bounds
        raise CheckpointError(f"{entry.file}: {entry.name} holds nan or infinite values (stored {entry.dtype}, used as "
                              f"{tensor.dtype}). Download the file again; if it was converted to float16, use bfloat16.")
