"""A LoRA file as patches of the host's models. What is patched are clones; what was given stays as it is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from comfy.model_patcher import ModelPatcher
from comfy.weight_adapter.lora import LoRAAdapter
from torch import Tensor, nn

from ...blip3o_core.errors import InputError, readable
from ...blip3o_core.lora.apply import updated_weight
from ...blip3o_core.lora.files import LISTED, PREFIXES, QUERIES_KEY, Adapter, LoraFile
from .diffusion_models import FlowModel
from .hosting import HostedBackbone, Origin
from .io_types import require_connected

QUERIES = "latent_queries"
NAMES = {"dit": "diffusion model", "language_model": "language model", QUERIES: "learned queries"}
KNOWN = {"base": "blip3o.base_model", "fingerprint": "blip3o.base_fingerprint", "trigger": "blip3o.trigger"}


class DoraAdapter(LoRAAdapter):
    """DoRA as the paper and peft have it. The host's own divides by the norms of the rows before the update."""

    name = "blip3o_dora"

    def calculate_weight(
        self, weight: Tensor, key: str, strength: float, strength_model: float, offset, function, intermediate_dtype=None,
        original_weight=None,
    ) -> Tensor:  # fmt: skip
        up, down, alpha, _, magnitude, _ = self.weights
        return updated_weight(weight, Adapter(down, up, alpha, magnitude.flatten()), strength).to(weight.dtype)


@dataclass(frozen=True)
class Fit:
    """What of one component of a file fits a network.

    Attributes:
        adapters, differences: patches by the name of the parameter that they change, as the host takes them.
        unmatched: names of the others, each with the reason.
    """

    adapters: dict[str, LoRAAdapter] = field(default_factory=dict)
    differences: dict[str, Tensor] = field(default_factory=dict)
    unmatched: tuple[str, ...] = ()

    @property
    def matched(self) -> int:
        return len({*self.adapters, *self.differences})


def apply_lora(
    lora: LoraFile, source: str, model: ModelPatcher, backbone: HostedBackbone | None, *, strength_model: float = 1.0,
    strength_backbone: float = 1.0, allow_other_base: bool = False,
) -> tuple[ModelPatcher, HostedBackbone | None, str]:  # fmt: skip
    """-> patched clones and a report. A backbone may be absent; the part of the file that is for it is then left out.

    Raises: InputError if `model` isn't the BLIP3-o diffusion model, the file is of another base, or nothing of it fits.
    """
    require_connected(model=model, **({} if backbone is None else {"backbone": backbone}))
    if not isinstance(model.model, FlowModel):
        raise InputError(f"this MODEL is {type(model.model).__name__}, not the BLIP3-o diffusion model. Connect the output model of Load "
                         "BLIP3-o Checkpoint; the decoder takes no BLIP3-o LoRA.")
    require_same_base(lora, source, [("MODEL", model.model.origin), *([] if backbone is None else [("backbone", backbone.origin)])],
                      allow_other_base)  # fmt: skip
    networks = {"dit": model.model, "language_model": None if backbone is None else backbone.backbone}
    fits = {component: fit(lora, component, network) for component, network in networks.items() if network is not None}
    if backbone is not None:
        fits[QUERIES] = fit_queries(lora, backbone)
    if not any(part.matched for part in fits.values()):
        raise InputError(nothing_matches(lora, source, fits))
    strengths = {"dit": strength_model, "language_model": strength_backbone, QUERIES: strength_backbone}
    if strength_model:
        model = patched(model, fits["dit"], strength_model)
    if backbone is not None and strength_backbone:
        patcher = patched(backbone.patcher, fits["language_model"], strength_backbone)
        for name, difference in fits[QUERIES].differences.items():
            add_to_parameter(patcher, name, difference, strength_backbone)
        backbone = backbone.with_patcher(patcher)
    return model, backbone, report(lora, source, fits, strengths)


def require_same_base(lora: LoraFile, source: str, origins: Iterable[tuple[str, Origin]], allow_other_base: bool) -> None:
    """Raises InputError if the file says that it was trained on a base with another fingerprint than one of `origins`."""
    trained_on = lora.metadata.get(KNOWN["fingerprint"])
    for what, origin in origins:
        if trained_on and trained_on != origin.fingerprint and not allow_other_base:
            raise InputError(f"{source}: trained on {lora.metadata.get(KNOWN['base']) or 'another model'} ({trained_on}), this {what} is "
                             f"of {origin.name} ({origin.fingerprint}). Load the checkpoint that it was trained on, or turn on "
                             "allow_other_base to use it all the same.")


def fit(lora: LoraFile, component: str, network: nn.Module) -> Fit:
    """Sorts the adapters and differences of "dit" or "language_model" by whether `network` has a parameter of that name and shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    prefix = PREFIXES[component]
    adapters = {f"{prefix}{path}.weight": adapter for path, adapter in lora.adapters.get(component, {}).items()}
    differences = {prefix + name: tensor for name, tensor in lora.differences.get(component, {}).items()}
    wanted = {name: adapter.shape for name, adapter in adapters.items()} | {name: tuple(t.shape) for name, t in differences.items()}
    unmatched = {name: f"{name} (is {shapes[name]}, not {shape})" if name in shapes else name
                 for name, shape in wanted.items() if shapes.get(name) != shape}  # fmt: skip
    return Fit(
        {name: host_adapter(adapter) for name, adapter in adapters.items() if name not in unmatched},
        {name: difference for name, difference in differences.items() if name not in unmatched},
        tuple(unmatched.values()),
    )


def fit_queries(lora: LoraFile, backbone: HostedBackbone) -> Fit:
    shape = tuple(backbone.backbone.latent_queries.shape)
    if lora.queries is None:
        return Fit()
    if tuple(lora.queries.shape) != shape:
        return Fit(unmatched=(f"{QUERIES_KEY} (is {shape}, not {tuple(lora.queries.shape)})",))
    return Fit(differences={QUERIES: lora.queries})


def host_adapter(adapter: Adapter) -> LoRAAdapter:
    magnitude = None if adapter.magnitude is None else adapter.magnitude[:, None]
    kind = LoRAAdapter if magnitude is None or adapter.over_base else DoraAdapter
    return kind(set(), (adapter.up, adapter.down, adapter.alpha, None, magnitude, None))


def patched(patcher: ModelPatcher, part: Fit, strength: float) -> ModelPatcher:
    """A clone with the patches, which the host adds to the weights when it loads or streams them."""
    clone = patcher.clone()
    for patches in (part.adapters, {name: ("diff", (tensor,)) for name, tensor in part.differences.items()}):
        if patches:
            added = clone.add_patches(patches, strength)
            assert len(added) == len(patches), "a parameter that was there a moment ago"
    return clone


def add_to_parameter(patcher: ModelPatcher, name: str, difference: Tensor, strength: float) -> None:
    """Adds to a raw parameter in place of weight patches, which the host applies to layers only."""
    current = patcher.get_model_object(name)  # with what an earlier LoRA added
    updated = current.float() + strength * difference.to(current.device).float()
    patcher.add_object_patch(name, nn.Parameter(updated.to(current.dtype), requires_grad=False))


def nothing_matches(lora: LoraFile, source: str, fits: Mapping[str, Fit]) -> str:
    unmatched = [name for part in fits.values() for name in part.unmatched]
    if not unmatched:
        return f"{source}: is only for the language side, and no backbone is connected. Connect the backbone of Load BLIP3-o Checkpoint."
    more = f" and {len(unmatched) - LISTED} more" if len(unmatched) > LISTED else ""
    return (f"{source}: none of its {len(unmatched)} keys fits this model: {', '.join(unmatched[:LISTED])}{more}. It was trained on "
            "another base model; use it with that one.")  # fmt: skip


def report(lora: LoraFile, source: str, fits: Mapping[str, Fit], strengths: Mapping[str, float]) -> str:
    """What the file is, what of it was applied where, and what was not; a line each."""
    metadata = {name: lora.metadata.get(key, "") for name, key in KNOWN.items()}
    base = " ".join(filter(None, (metadata["base"], metadata["fingerprint"] and f"({metadata['fingerprint']})")))
    lines = [
        source,
        f"base model: {base or 'not recorded'}",
        f"rank: {numbers(adapter.rank for adapter in lora.all_adapters)}",
        f"alpha: {numbers(adapter.alpha for adapter in lora.all_adapters)}",
        f"trigger word: {metadata['trigger'] or 'none recorded'}",
    ]
    for component, name in NAMES.items():
        total = parameters_in(lora, component)
        if component not in fits:
            lines += [f"{name}: {total} in the file, not applied: no backbone is connected"] if total else []
            continue
        part = fits[component]
        if total:
            strength = f"strength {strengths[component]:g}" if strengths[component] else "strength 0, unchanged"
            lines.append(f"{name}: {part.matched} of {total} matched, {strength}")
        lines += [f"  not matched: {key}" for key in part.unmatched]
    return readable("\n".join(lines))


def parameters_in(lora: LoraFile, component: str) -> int:
    """How many parameters of a component the file changes."""
    if component == QUERIES:
        return int(lora.queries is not None)
    return len({f"{path}.weight" for path in lora.adapters.get(component, {})} | lora.differences.get(component, {}).keys())


def numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(set(values))) or "none"
