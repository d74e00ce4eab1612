"""The LoRA file: one safetensors with adapters of the diffusion transformer and of the language model.

Names are those that ComfyUI's own LoRA loader reads, so the file works there without any code of this package:
`diffusion_model.<layer>.lora_A.weight` (rank, in), `.lora_B.weight` (out, rank), `.alpha` (), for DoRA `.dora_scale` (out, 1);
the same under `language_model.`; `latent_queries.diff` (1, Q, H). The update of a weight is strength * alpha / rank * B @ A.
"""

import datetime
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.load import require_finite
from ..checkpoint.save import write_safetensors
from ..checkpoint.shards import TensorEntry, read_header, read_metadata, read_tensor
from ..errors import CheckpointError
from ..files import whole_file

PREFIXES = {"dit": "diffusion_model.", "language_model": "language_model."}
"""Component -> how its names begin in the file."""
QUERIES_KEY = "latent_queries.diff"
BASE_NORM_KEY = "blip3o.dora_norm"  # metadata; "base": see Adapter.over_base
LISTED = 8

# what other trainers put in front; the component it stands for, "" if it says nothing
WRAPPERS = (
    ("base_model.model.", ""), ("diffusion_model.", "dit"), ("model.dit.model.", "dit"), ("dit.", "dit"), ("transformer.", ""),
    ("language_model.", "language_model"), ("backbone.", ""), ("model.", ""),
)  # fmt: skip
LAYER_NAMES = {
    "dit": re.compile(r"layers\.\d+\.(attn1|attn2|feed_forward|norm1|norm1_context|norm2|ffn_norm1|ffn_norm2)\."
                      r"|(caption_projection|time_caption_embed|patch_embedder|norm_out)\."),
    "language_model": re.compile(r"layers\.\d+\.(self_attn|mlp|input_layernorm|post_attention_layernorm)\.|embed_tokens\.|norm\."),
}  # fmt: skip
KEY = re.compile(
    r"(.+?)\.(?:(?P<down>lora_A(?:\.\w+)?\.weight|lora_A|lora[._]down\.weight)|(?P<up>lora_B(?:\.\w+)?\.weight|lora_B|lora[._]up\.weight)"
    r"|(?P<alpha>alpha)|(?P<magnitude>dora_scale|lora_magnitude_vector(?:\.\w+){0,2})|(?P<weight>diff)|(?P<bias>diff_b))"
)


@dataclass(frozen=True)
class Adapter:
    """The update of one linear layer (out, in).

    Attributes:
        down, up: (rank, in) and (out, rank), in the dtype of the file.
        alpha: the update is alpha / rank * up @ down. rsLoRA stores alpha * sqrt(rank), so that every reader scales right.
        magnitude: (out,) for DoRA (arXiv:2402.09353): the norms that the rows of the updated weight get.
        over_base: ComfyUI's way of DoRA: rows are scaled by magnitude / norm of the *base's* row. See `lora.apply.for_host`.
    """

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    over_base: bool = False

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return self.up.shape[0], self.down.shape[1]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.down, self.up) if self.magnitude is None else (self.down, self.up, self.magnitude)

    def delta(self, device: torch.device | str | None = None) -> Tensor:
        """alpha / rank * up @ down as a float32 matrix (out, in), on `device` (None: where the factors are)."""
        return self.scale * (self.up.to(device, torch.float32) @ self.down.to(device, torch.float32))


Adapters = dict[str, Adapter]  # path of a linear layer in its network -> update


@dataclass(frozen=True)
class LoraFile:
    """What one file holds.

    Attributes:
        adapters: component ("dit", "language_model") -> path of the layer -> update; components without any are left out.
        queries: (1, Q, H), added to the learned queries.
        metadata: strings, as in the file.
        differences: component -> name of a parameter -> what is added to it. ComfyUI's TrainLoraNode writes these for norms
            and biases, this package doesn't.
    """

    adapters: dict[str, Adapters]
    queries: Tensor | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    differences: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def all_adapters(self) -> list[Adapter]:
        return [adapter for adapters in self.adapters.values() for adapter in adapters.values()]


def lora_metadata(
    lora: LoraFile, *, title: str, fingerprint: str = "", base_model: str = "", trigger: str = "", training_steps: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> dict[str, str]:  # fmt: skip
    """The strings that tell what a file is (modelspec 1.0.1) and what it was trained on; what isn't known is left out."""
    ranks = sorted({adapter.rank for adapter in lora.all_adapters})
    alphas = sorted({adapter.alpha for adapter in lora.all_adapters})
    known = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "blip3o/lora",
        "modelspec.title": title,
        "modelspec.date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "modelspec.trigger_phrase": trigger,
        "blip3o.base_fingerprint": fingerprint,
        "blip3o.base_model": base_model,
        "blip3o.rank": ", ".join(map(str, ranks)),
        "blip3o.alpha": ", ".join(f"{alpha:g}" for alpha in alphas),
        "blip3o.trigger": trigger,
        "blip3o.training_steps": "" if training_steps is None else str(training_steps),
        "blip3o.config": "" if config is None else json.dumps(config),
    }
    return {key: value for key, value in known.items() if value}


def write_lora(path: Path, lora: LoraFile) -> None:
    """Writes the file, whole or not at all; an existing one is replaced. Raises OutputError if it can't be written."""
    metadata = {key: value for key, value in lora.metadata.items() if key != BASE_NORM_KEY}
    if any(adapter.over_base for adapter in lora.all_adapters):
        assert all(adapter.over_base or adapter.magnitude is None for adapter in lora.all_adapters), "two kinds of DoRA in one file"
        metadata[BASE_NORM_KEY] = "base"
    with whole_file(path) as temporary:
        write_safetensors(temporary, named_tensors(lora), metadata)


def named_tensors(lora: LoraFile) -> dict[str, Tensor]:
    """Everything in `lora` under its name in the file."""
    tensors = {}
    for component, adapters in lora.adapters.items():
        for path, adapter in adapters.items():
            name = PREFIXES[component] + path
            tensors[f"{name}.lora_A.weight"] = adapter.down
            tensors[f"{name}.lora_B.weight"] = adapter.up
            tensors[f"{name}.alpha"] = torch.tensor(adapter.alpha, dtype=torch.float32)
            if adapter.magnitude is not None:
                tensors[f"{name}.dora_scale"] = adapter.magnitude[:, None]
    for component, differences in lora.differences.items():
        for parameter, difference in differences.items():
            path, _, kind = parameter.rpartition(".")
            tensors[f"{PREFIXES[component]}{path}.{'diff' if kind == 'weight' else 'diff_b'}"] = difference
    if lora.queries is not None:
        tensors[QUERIES_KEY] = lora.queries
    return tensors


def read_lora(path: Path) -> LoraFile:
    """Reads a file of this package, of ComfyUI's SaveLoRA, or of another trainer that uses the networks' layer names.

    Raises: CheckpointError if the file is missing, damaged or no LoRA, holds names that no BLIP3-o network has, half an adapter,
        factors that don't fit together, or values that are not finite.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, but a LoRA is one .safetensors file. A folder that peft wrote becomes one by: "
                              f"blip3o lora convert {path} {path.name}.safetensors")
    entries = read_header(path)
    metadata = read_metadata(path)
    return from_entries(entries, metadata, path)


def from_entries(
    entries: Mapping[str, TensorEntry], metadata: dict[str, str], source: Path, alphas: Mapping[str, float] | None = None
) -> LoraFile:
    """Sorts and reads the tensors of one file. alphas: by path, for adapters that come without; else theirs is the rank."""
    parts, unknown, queries = _sort(entries, source)
    if unknown:
        raise CheckpointError(f"{source}: holds {len(unknown)} tensors that no BLIP3-o LoRA has: {_listed(unknown)}. It was made for "
                              "another model, or in a form that isn't read here (LoHa, LoKr, OFT).")
    if not parts and queries is None:
        raise CheckpointError(f"{source}: holds no LoRA: {len(entries)} tensors. Give a file with lora_A and lora_B matrices.")
    over_base = metadata.get(BASE_NORM_KEY) == "base"
    adapters: dict[str, Adapters] = {}
    differences: dict[str, dict[str, Tensor]] = {}
    for (component, path), found in parts.items():
        for kind in ("weight", "bias"):
            if kind in found:
                differences.setdefault(component, {})[f"{path}.{kind}"] = _read(found[kind])
        if found.keys() & {"down", "up", "alpha", "magnitude"}:
            default = None if alphas is None else alphas.get(path)
            adapters.setdefault(component, {})[path] = _adapter(path, found, source, over_base, default)
    return LoraFile(adapters, None if queries is None else _read(queries), metadata, differences)


def locate(name: str) -> tuple[str, str] | None:
    """Layer as a trainer names it -> (component, path in the component's network); None if it is of neither."""
    said = ""
    stripped = True
    while stripped:
        stripped = False
        for prefix, component in WRAPPERS:
            if name.startswith(prefix):
                name, said, stripped = name[len(prefix) :], component or said, True
                break
    seen = next((component for component, pattern in LAYER_NAMES.items() if pattern.match(f"{name}.")), "")
    if not (said or seen) or (said and seen and said != seen):
        return None
    return said or seen, name


def _sort(
    entries: Mapping[str, TensorEntry], source: Path
) -> tuple[dict[tuple[str, str], dict[str, TensorEntry]], list[str], TensorEntry | None]:
    """-> {(component, path): {kind: entry}}, names that are not known, the entry of the queries."""
    parts: dict[tuple[str, str], dict[str, TensorEntry]] = {}
    unknown = []
    for name, entry in sorted(entries.items()):
        match = KEY.fullmatch(name)
        place = locate(match[1]) if match else None
        if name == QUERIES_KEY:
            continue
        if place is None:
            unknown.append(name)
            continue
        found = parts.setdefault(place, {})
        if match.lastgroup in found:
            raise CheckpointError(f"{source}: {found[match.lastgroup].name} and {name} are the same matrix of one layer. The file was "
                                  "merged by hand; export it again.")
        found[match.lastgroup] = entry
    return parts, unknown, entries.get(QUERIES_KEY)


def _adapter(path: str, found: Mapping[str, TensorEntry], source: Path, over_base: bool, default_alpha: float | None) -> Adapter:
    lacking = [name for kind, name in (("down", "lora_A"), ("up", "lora_B")) if kind not in found]
    if lacking:
        raise CheckpointError(f"{source}: {path} has {', '.join(entry.name.rpartition(path)[2].strip('.') for entry in found.values())} "
                              f"but no {' and no '.join(lacking)}. The file is incomplete; export it again.")
    down, up = found["down"], found["up"]
    if len(down.shape) != 2 or len(up.shape) != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise CheckpointError(f"{source}: {path} has lora_A {list(down.shape)} and lora_B {list(up.shape)}, expected [rank, in] and "
                              "[out, rank] of one rank. The file is damaged or was merged by hand.")
    alpha = down.shape[0] if default_alpha is None else default_alpha
    if "alpha" in found:
        if found["alpha"].numel != 1:
            raise CheckpointError(f"{source}: {found['alpha'].name} is {list(found['alpha'].shape)}, expected one number.")
        alpha = _read(found["alpha"]).item()
    magnitude = None
    if "magnitude" in found:
        shape, out = found["magnitude"].shape, up.shape[0]
        if shape not in ((out,), (out, 1)):
            raise CheckpointError(f"{source}: {found['magnitude'].name} is {list(shape)}, expected [{out}] or [{out}, 1]: one magnitude "
                                  "per output. DoRA over inputs is not read here.")
        magnitude = _read(found["magnitude"]).reshape(out)
    return Adapter(_read(down), _read(up), float(alpha), magnitude, over_base and magnitude is not None)


def _read(entry: TensorEntry) -> Tensor:
    """A copy, so that the file may be replaced later. Raises CheckpointError if a value is not finite."""
    if not entry.dtype.is_floating_point:
        raise CheckpointError(f"{entry.file}: {entry.name} is stored as {entry.dtype}; only floating point is read here.")
    tensor = read_tensor(entry).clone()
    require_finite(entry, tensor if entry.dtype.itemsize > 1 else tensor.float())
    return tensor


def _listed(names: list[str]) -> str:
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
