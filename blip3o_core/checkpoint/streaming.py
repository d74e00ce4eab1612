"""Networks that hold no weights: every layer reads its own from the file when it runs, and lets go of them afterwards.

Peak memory is that of the largest layer and of what passes between them; the price is reading the files once per pass, mostly from the
system's cache.
"""

from collections.abc import Mapping

import torch
from torch import nn

from .shards import TensorEntry, is_quantised, map_tensor, read_tensor

KEPT_BYTES = 2**20
"""Smaller tensors stay."""


def stream_layers(module: nn.Module, entries: Mapping[str, TensorEntry], *, dtype: torch.dtype | None, device: torch.device) -> list[str]:
    """Hooks the layers whose weights are large -> names of the tensors that they will read; the others are for the caller to place.

    Args:
        module: built on the meta device; its state-dict names are the keys of `entries`.
        dtype, device: in which layers compute.
    """
    by_layer: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        path, _, parameter = name.rpartition(".")
        if entry.nbytes >= KEPT_BYTES and not list(module.get_submodule(path).children()):
            by_layer.setdefault(path, {})[parameter] = entry
    for path, own in by_layer.items():
        layer = module.get_submodule(path)
        if isinstance(layer, nn.Embedding):
            _look_up_in_file(layer, own, dtype, device)
        else:
            as_stored = is_quantised(f"{path}.weight".lstrip("."), entries)
            _StreamedLayer(layer, own, None if as_stored else dtype, device)
    return [f"{path}.{parameter}" for path, own in by_layer.items() for parameter in own]


class _StreamedLayer:
    """The hooks of one layer."""

    def __init__(self, layer: nn.Module, entries: dict[str, TensorEntry], dtype: torch.dtype | None, device: torch.device) -> None:
        self.entries, self.dtype, self.device = entries, dtype, device
        self.empty = {name: nn.Parameter(torch.empty(entry.shape, dtype=dtype or entry.dtype, device="meta"), requires_grad=False)
                      for name, entry in entries.items()}  # fmt: skip
        layer._parameters.update(self.empty)
        layer.register_forward_pre_hook(self.read)
        layer.register_forward_hook(self.release, always_call=True)

    def read(self, layer: nn.Module, _) -> None:
        for name, entry in self.entries.items():
            layer._parameters[name] = nn.Parameter(read_tensor(entry, dtype=self.dtype, device=self.device), requires_grad=False)

    def release(self, layer: nn.Module, *_) -> None:
        layer._parameters.update(self.empty)


def _look_up_in_file(layer: nn.Embedding, entries: dict[str, TensorEntry], dtype: torch.dtype | None, device: torch.device) -> None:
    """The table stays a mapping of the file, of which only the rows in question are read."""
    layer._parameters.update({name: nn.Parameter(map_tensor(entry), requires_grad=False) for name, entry in entries.items()})
    layer.register_forward_pre_hook(lambda _, arguments: (arguments[0].cpu(), *arguments[1:]))
    layer.register_forward_hook(lambda _, __, rows: rows.to(device=device, dtype=dtype))
