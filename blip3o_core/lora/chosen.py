"""LoRAs that were chosen for a checkpoint: read and checked before any weights are, merged when those are loaded."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..checkpoint.shards import TensorEntry
from ..errors import InputError
from ..models.nextdit import NextDiT
from ..models.qwen2_5_vl import Backbone
from ..variants.blip3o import Blip3oCheckpoint
from .apply import merge, merge_queries, require_base, require_fitting, require_fitting_queries
from .files import Adapters, LoraFile, read_lora

LANGUAGE_MODEL = "language_model."  # where the adapted network is in `Backbone`


@dataclass(frozen=True)
class ChosenLora:
    """A LoRA that fits the checkpoint it was opened for, and how strongly it is to act."""

    file: LoraFile
    strength: float
    source: Path

    @property
    def label(self) -> str:
        """As a recipe names it: "name.safetensors:0.8"."""
        return f"{self.source.name}:{self.strength:g}"

    def adapters(self, component: str) -> Adapters:
        return self.file.adapters.get(component, {})

    def differences(self, component: str) -> dict[str, Tensor]:
        return self.file.differences.get(component, {})

    def merge_dit(self, dit: NextDiT) -> None:
        """In place."""
        merge(dit, self.adapters("dit"), self.strength, self.source, differences=self.differences("dit"))

    def merge_backbone(self, backbone: Backbone) -> None:
        """In place: language model and learned queries."""
        merge(backbone.language_model, self.adapters("language_model"), self.strength, self.source,
              differences=self.differences("language_model"))  # fmt: skip
        if self.file.queries is not None:
            merge_queries(backbone, self.file.queries, self.strength, self.source)


def open_loras(
    checkpoint: Blip3oCheckpoint, chosen: Sequence[tuple[str | Path, float]], *, allow_other_base: bool = False
) -> tuple[ChosenLora, ...]:
    """Reads (file, strength) pairs and checks them against the headers of `checkpoint`.

    Raises: CheckpointError for a damaged file, InputError for one of another base or a strength that is not finite.
    """
    opened = []
    for path, strength in chosen:
        if not math.isfinite(strength):
            raise InputError(f"{path}: strength {strength} is not a finite number; 1 is as trained, 0 is off.")
        lora = ChosenLora(read_lora(Path(path)), float(strength), Path(path))
        require_base(lora.file, checkpoint.fingerprint, path, allow_other_base, base_model=checkpoint.folder.resolve().name)
        for component, names in (("dit", "diffusion transformer"), ("language_model", "language model")):
            if component == "language_model" and lora.adapters(component) and checkpoint.is_quantised:
                raise InputError(f"{path}: changes the language model, which is quantised in {checkpoint.folder}. Use it with the "
                                 "original, or merge it there first (blip3o lora merge) and quantise the result.")
            require_fitting(lora.adapters(component), component_shapes(checkpoint, component), path, names, lora.differences(component))
        if lora.file.queries is not None:
            require_fitting_queries(lora.file.queries, checkpoint.components["queries"]["latent_queries"].shape, path)
        opened.append(lora)
    return tuple(opened)


def component_shapes(checkpoint: Blip3oCheckpoint, component: str) -> dict[str, tuple[int, ...]]:
    """Shapes by the names that LoRA files use."""
    return {name: entry.shape for name, entry in component_entries(checkpoint, component).items()}


def component_entries(checkpoint: Blip3oCheckpoint, component: str) -> Mapping[str, TensorEntry]:
    """The parameters of "dit" or "language_model" by the names that LoRA files use."""
    prefix = LANGUAGE_MODEL if component == "language_model" else ""
    return {name.removeprefix(prefix): entry for name, entry in checkpoint.components[component].items()}
