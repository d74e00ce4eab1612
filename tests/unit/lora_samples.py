"""Random LoRAs of the tiny checkpoint."""

from collections.abc import Iterable

import torch

from blip3o_core.lora.files import Adapter, LoraFile, lora_metadata
from blip3o_core.lora.targets import DIT_TARGETS, LANGUAGE_MODEL_TARGETS
from blip3o_core.variants.blip3o import Blip3oCheckpoint

SIZE = 0.1  # of the random factors: updates change the velocity by some 10 %


def random_adapter(shape: tuple[int, int], generator: torch.Generator, *, rank: int = 4, alpha: float = 3.0, dora: bool = False) -> Adapter:
    """shape: (out, in) of the layer."""
    out, width = shape
    return Adapter(
        SIZE * torch.randn(rank, width, generator=generator),
        SIZE * torch.randn(out, rank, generator=generator),
        alpha,
        0.5 + torch.rand(out, generator=generator) if dora else None,
    )


def random_lora(
    checkpoint: Blip3oCheckpoint, *, seed: int = 0, parts: Iterable[str] = ("dit", "language_model", "latent_queries"), dora: bool = False,
    rank: int = 4,
) -> LoraFile:  # fmt: skip
    """Adapters of all default layers; one of each network has another rank and alpha. Metadata names the checkpoint as base."""
    generator = torch.Generator().manual_seed(seed)
    adapters = {}
    for component, targets in (("dit", DIT_TARGETS), ("language_model", LANGUAGE_MODEL_TARGETS)):
        if component in parts:
            shapes = {name.removeprefix("language_model.").removesuffix(".weight"): entry.shape
                      for name, entry in checkpoint.components[component].items() if name.endswith(".weight")}  # fmt: skip
            chosen = sorted(path for path in shapes if path.endswith(targets))
            adapters[component] = {path: random_adapter(shapes[path], generator, rank=rank, dora=dora) for path in chosen}
            adapters[component][chosen[0]] = random_adapter(shapes[chosen[0]], generator, rank=2, alpha=7.0, dora=dora)
    queries = SIZE * torch.randn(1, checkpoint.num_queries, 64, generator=generator) if "latent_queries" in parts else None
    lora = LoraFile(adapters, queries)
    metadata = lora_metadata(lora, title="test", fingerprint=checkpoint.fingerprint, base_model=checkpoint.folder.name, trigger="xyz style",
                             training_steps=100, config={"rank": 4})  # fmt: skip
    return LoraFile(adapters, queries, metadata)
