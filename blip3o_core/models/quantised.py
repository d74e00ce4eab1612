"""Linear layers and embeddings that keep their weights in 8 or 4 bits and compute in the precision of what they are given.

fp8 (e4m3) and int8 have one scale per row, int4 one per row and group of up to 64 columns. A weight is stored as `weight` and
`weight_scale`; float precision exists for one layer at a time, while it runs. Rounding is to the nearest value: no data is needed.

Own code, and no torchao or bitsandbytes: their 4-bit layouts differ by device and version, so that a file made on one machine need not
load on another, and neither shares layers with ComfyUI's memory management. This is plain torch, which runs wherever torch does.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.shards import SCALE, TensorEntry
from ..errors import CheckpointError

FORMATS = ("fp8", "int8", "int4")
GROUP = 64  # columns that share a scale in int4: 4.25 bits per weight
CLIPPING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
_FP8 = torch.float8_e4m3fn
_LARGEST = {"fp8": torch.finfo(_FP8).max, "int8": 127, "int4": 7}


def quantise(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """weight (out, in), kind of FORMATS -> the same as it is stored, and its scales (out, groups); int4 packs two columns in a byte."""
    rows = weight.float()
    grouped = rows.unflatten(1, (-1, columns_per_scale(rows.shape[1], kind)))  # (out, groups, columns)
    scale = grouped.abs().amax(dim=2).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST[kind]  # (out, groups)
    if kind == "int4":
        scale = _best_of(scale, grouped).to(torch.bfloat16)
    values = grouped / scale.float()[:, :, None]
    if kind == "fp8":
        return values.flatten(1).to(_FP8), scale
    values = values.round().clamp(-_LARGEST[kind] - 1, _LARGEST[kind]).flatten(1)
    if kind == "int8":
        return values.to(torch.int8), scale
    nibbles = (values + 8).to(torch.uint8).unflatten(1, (-1, 2))
    return nibbles[:, :, 0] | (nibbles[:, :, 1] << 4), scale


def _best_of(scale: Tensor, grouped: Tensor) -> Tensor:
    """With few levels it pays to clip the largest values: of some smaller scales, for each group the one with the least squared error."""
    best, least = scale, torch.full_like(scale, torch.inf)
    for factor in CLIPPING:
        own = (scale * factor)[:, :, None]
        error = ((grouped / own).round().clamp(-8, 7) * own - grouped).square().sum(dim=2)  # (out, groups)
        best, least = torch.where(error < least, own[:, :, 0], best), torch.minimum(error, least)
    return best


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """What `quantise` gave -> (out, in) float32."""
    if weight.dtype == torch.uint8:
        weight = torch.stack((weight & 15, weight >> 4), dim=2).flatten(1).to(torch.int8) - 8
    return (weight.float().unflatten(1, (scale.shape[1], -1)) * scale.float()[:, :, None]).flatten(1)


def columns_per_scale(columns: int, kind: str) -> int:
    """All of them, or for int4 the largest even divisor up to GROUP. Raises CheckpointError if there is none."""
    if kind != "int4":
        return columns
    found = next((size for size in range(GROUP, 0, -2) if columns % size == 0), None)
    if found is None:
        raise CheckpointError(f"a matrix of {columns} columns can't be stored in 4 bits: the number is odd. Use int8 or fp8.")
    return found


def stored_as(shape: tuple[int, ...], kind: str) -> tuple[tuple[tuple[int, ...], torch.dtype], tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of the stored weight and of its scales, for a matrix of this shape."""
    rows, columns = shape
    scales = (rows, columns // columns_per_scale(columns, kind))
    if kind == "int4":
        return ((rows, columns // 2), torch.uint8), (scales, torch.bfloat16)
    return ((rows, columns), _FP8 if kind == "fp8" else torch.int8), (scales, torch.float32)


class QuantisedLinear(nn.Linear):
    """With `weight` as `quantise` gives it, and `weight_scale`."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x."""
        return F.linear(x, dequantise(self.weight.to(x.device), self.weight_scale.to(x.device)).to(x.dtype),
                        None if self.bias is None else self.bias.to(x))  # fmt: skip


class QuantisedEmbedding(nn.Embedding):
    """Only the rows that are looked up are converted."""

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., width) float32."""
        flat = ids.flatten().to(self.weight.device)
        rows = self.weight.view(torch.uint8)[flat].view(self.weight.dtype)  # as bytes: torch below 2.7 can't index fp8 on the CPU
        return dequantise(rows, self.weight_scale[flat]).unflatten(0, ids.shape).to(ids.device)

    def project(self, states: Tensor) -> Tensor:
        """States (..., width) -> logits (..., vocabulary), where the matrix serves as output head."""
        return F.linear(states, dequantise(self.weight.to(states.device), self.weight_scale.to(states.device)).to(states.dtype))


_CLASSES = {nn.Linear: QuantisedLinear, nn.Embedding: QuantisedEmbedding}


def adopt_quantised(module: nn.Module, entries: Mapping[str, TensorEntry], source: object) -> nn.Module:
    """Makes layers of an empty `module` quantised, those for which `entries` holds scales. Raises CheckpointError if they don't fit."""
    for name, scale in entries.items():
        path, _, suffix = name.rpartition(".")
        if suffix != SCALE:
            continue
        weight = entries.get(name.removesuffix(SCALE) + "weight")
        layer = dict(module.named_modules()).get(path) if path else module
        if weight is None or type(layer) not in _CLASSES:
            raise CheckpointError(f"{source}: {scale.name} belongs to no weight of this model. Quantise the model again.")
        rows, columns = layer.weight.shape
        packed = columns // 2 if weight.dtype == torch.uint8 else columns
        if weight.shape != (rows, packed) or len(scale.shape) != 2 or scale.shape[0] != rows or columns % max(scale.shape[1], 1):
            raise CheckpointError(f"{source}: {weight.name} is {list(weight.shape)} with scales {list(scale.shape)}, for a matrix of "
                                  f"{rows} x {columns}. Quantise the model again.")
        layer.__class__ = _CLASSES[type(layer)]
        for parameter, entry in (("weight", weight), (SCALE, scale)):
            empty = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
            layer.register_parameter(parameter, nn.Parameter(empty, requires_grad=False))
    return module
