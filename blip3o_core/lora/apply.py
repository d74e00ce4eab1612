"""Adds LoRA updates to weights: strength * alpha / rank * B @ A, and for DoRA new norms of the rows."""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..models.qwen2_5_vl import Backbone
from .files import LISTED, Adapter, Adapters, LoraFile

log = logging.getLogger(__name__)

Shapes = Mapping[str, tuple[int, ...]]
OTHER_BASE = "It was trained on another base model; use it with that one."


def require_base(lora: LoraFile, fingerprint: str, source: object, allow_other_base: bool, *, base_model: str = "this model") -> None:
    """Raises InputError if `lora` says that it was trained on a base with another fingerprint.

    A file that doesn't say is taken with a warning. Names and shapes are checked elsewhere, whatever is allowed here.
    """
    trained_on = lora.metadata.get("blip3o.base_fingerprint")
    if not trained_on:
        log.warning("%s doesn't say which model it was trained on; %s is taken for it.", source, base_model)
    elif trained_on != fingerprint and not allow_other_base:
        raise InputError(f"{source}: trained on {lora.metadata.get('blip3o.base_model') or 'another model'} ({trained_on}), this is "
                         f"{base_model} ({fingerprint}). Pass --lora-any-base (in Python allow_other_base=True) to use it all the same.")


def require_fitting(
    adapters: Adapters, shapes: Shapes, source: object, component: str, differences: Mapping[str, Tensor] | None = None
) -> None:
    """Raises InputError that lists adapters whose layer isn't among `shapes` (parameter name -> shape), or is of another shape."""
    expected = {f"{path}.weight": adapter.shape for path, adapter in adapters.items()}
    expected |= {name: tuple(difference.shape) for name, difference in (differences or {}).items()}
    absent = sorted(name for name in expected if name not in shapes)
    misshapen = sorted(f"{name} is {list(shapes[name])}, the update {list(shape)}" for name, shape in expected.items()
                       if name in shapes and tuple(shapes[name]) != tuple(shape))  # fmt: skip
    problems = [f"{len(names)} of {len(expected)} layers {kind}: {', '.join(names[:LISTED])}{' ...' if len(names) > LISTED else ''}"
                for kind, names in (("are not in it", absent), ("have another shape", misshapen)) if names]
    if problems:
        raise InputError(f"{source}: doesn't fit the {component} of this model; {'; '.join(problems)}. {OTHER_BASE}")


def require_fitting_queries(difference: Tensor, shape: tuple[int, ...], source: object) -> None:
    """Raises InputError unless `difference` has the `shape` of the learned queries."""
    if tuple(difference.shape) != tuple(shape):
        raise InputError(f"{source}: its learned queries are {list(difference.shape)}, this model's {list(shape)}. {OTHER_BASE}")


@torch.no_grad()
def updated_weight(weight: Tensor, adapter: Adapter, strength: float = 1.0) -> Tensor:
    """weight (out, in) with the update, in float32 on the device of `weight`, which stays as it is.

    DoRA rows become magnitude * (W + delta) / |W + delta| (arXiv:2402.09353, as peft does); the strength blends linearly, as
    in ComfyUI.
    """
    base, delta = weight.float(), adapter.delta(weight.device)
    if adapter.magnitude is None:
        return base + strength * delta
    full = delta.add_(base)
    norms = row_norms(base if adapter.over_base else full)
    full *= (adapter.magnitude.to(norms) / norms)[:, None]
    return full if strength == 1 else torch.lerp(base, full, strength)


def row_norms(weight: Tensor) -> Tensor:
    """(out, in) -> (out,) float32, never 0."""
    return torch.linalg.vector_norm(weight.float(), dim=1).clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def merge(
    network: nn.Module, adapters: Adapters, strength: float, source: object, *, differences: Mapping[str, Tensor] | None = None
) -> None:
    """Adds the updates to the weights of `network` in place, in float32 and rounded once to the dtype of each weight.

    Raises: InputError if a layer is unknown or of another shape, before anything is changed.
    """
    parameters = dict(network.named_parameters())
    differences = differences or {}
    require_fitting(adapters, {name: tuple(parameter.shape) for name, parameter in parameters.items()}, source,
                    type(network).__name__, differences)  # fmt: skip
    for path, adapter in adapters.items():
        weight = parameters[f"{path}.weight"]
        weight.copy_(updated_weight(weight, adapter, strength))
    for name, difference in differences.items():
        _add(parameters[name], difference, strength)


@torch.no_grad()
def merge_queries(backbone: Backbone, difference: Tensor, strength: float, source: object = "this LoRA") -> None:
    """Adds strength * difference (1, Q, H) to the learned queries in place. Raises InputError if the shape is another one."""
    require_fitting_queries(difference, tuple(backbone.latent_queries.shape), source)
    _add(backbone.latent_queries, difference, strength)


def for_host(lora: LoraFile, networks: Mapping[str, nn.Module]) -> LoraFile:
    """The same LoRA with magnitudes as ComfyUI's loader takes them; without DoRA it is `lora` itself.

    ComfyUI divides by the norms of the base's rows, peft and the paper by those of the updated rows. Rescaled magnitudes give
    the paper's result in both, on this base. Networks: component -> network with the base's weights.
    """
    return _rescaled(lora, networks, over_base=True)


def for_peft(lora: LoraFile, networks: Mapping[str, nn.Module]) -> LoraFile:
    """Undoes `for_host`: magnitudes are the norms of the updated rows again, as in peft."""
    return _rescaled(lora, networks, over_base=False)


@torch.no_grad()
def rescaled(adapter: Adapter, weight: Tensor, *, over_base: bool) -> Adapter:
    """`adapter` with the other kind of magnitudes, for the base's `weight`; the updated weight stays the same."""
    if adapter.magnitude is None or adapter.over_base == over_base:
        return adapter
    base = weight.float()
    ratio = row_norms(base) / row_norms(base + adapter.delta(weight.device))
    magnitude = adapter.magnitude.to(ratio) * (ratio if over_base else 1 / ratio)
    return replace(adapter, magnitude=magnitude.to(adapter.magnitude), over_base=over_base)


def _rescaled(lora: LoraFile, networks: Mapping[str, nn.Module], *, over_base: bool) -> LoraFile:
    if all(adapter.magnitude is None or adapter.over_base == over_base for adapter in lora.all_adapters):
        return lora
    return replace(lora, adapters={
        component: {path: rescaled(adapter, networks[component].get_submodule(path).weight, over_base=over_base)
                    for path, adapter in adapters.items()}
        for component, adapters in lora.adapters.items()
    })  # fmt: skip


def _add(parameter: Tensor, difference: Tensor, strength: float) -> None:
    parameter.copy_(parameter.float() + strength * difference.to(parameter.device, torch.float32))


