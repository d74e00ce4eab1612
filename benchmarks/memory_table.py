"""Bytes of weights per task, size and --offload, computed from the tensor manifests of the published models. Prints a Markdown table.

    python benchmarks/memory_table.py

What passes through the networks comes on top: see docs/memory.md.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from blip3o_core.checkpoint.shards import TensorEntry
from blip3o_core.checkpoint.streaming import KEPT_BYTES
from blip3o_core.models.quantised import FORMATS, stored_as
from blip3o_core.variants.blip3o import TASKS, split_components
from blip3o_core.variants.quantise import FINE
from blip3o_core.variants.sdxl_decoder import VAE_ENCODER_PREFIXES

MANIFESTS = Path(__file__).parents[1] / "tests" / "data" / "manifests"
PRECISIONS = (torch.bfloat16, torch.float32)
STAGE_OF = {"language_model": "language", "queries": "language", "vision_tower": "language", "output_head": "language",
            "dit": "embedding", "vision_encoder": "encoder", "decoder": "picture"}  # fmt: skip

Shapes = Mapping[str, tuple[int, ...]]


def main() -> None:
    print("| task | model | precision | none | stage | layer |\n|---|---|---|---|---|---|")
    for task, parts in TASKS.items():
        for size in ("4b", "8b"):
            components = published(size)
            used = {part: components[part] for part in (*parts, *(() if task == "understanding" else ("decoder",)))}
            for dtype in PRECISIONS:
                cells = " | ".join(f"{nbytes / 1e9:.1f} GB" for nbytes in table_row(used, dtype.itemsize))
                print(f"| {task} | {size.upper()} | {str(dtype).removeprefix('torch.')} | {cells} |")
    print("\n| backbone | 4B | 8B |\n|---|---|---|")
    for kind in (None, *FORMATS):
        cells = (backbone_bytes(published(size), kind) for size in ("4b", "8b"))
        print(f"| {kind or 'bfloat16'} | " + " | ".join(f"{nbytes / 1e9:.1f} GB" for nbytes in cells) + " |")


def backbone_bytes(components: Mapping[str, Shapes], kind: str | None) -> int:
    """As `save_quantised` stores it; None is bfloat16."""
    total = 0
    for name, shape in {**components["language_model"], **components["queries"]}.items():
        stored = [(shape, torch.bfloat16)]
        if kind and len(shape) == 2:
            stored = stored_as(shape, FINE if kind == "int4" and "embed_tokens" in name else kind)
        total += sum(torch.Size(size).numel() * dtype.itemsize for size, dtype in stored)
    return total


def published(size: str) -> dict[str, Shapes]:
    """Component -> shapes of its tensors. 4B has tied embeddings: the head is not among them, the table serves twice."""
    entries = {name: TensorEntry(name, Path(size), torch.bfloat16, shape, 0, 0) for name, shape in manifest(f"blip3o-{size}").items()}
    components = {part: {name: entry.shape for name, entry in own.items()} for part, own in split_components(entries, Path(size)).items()}
    vae = {f"vae.{name}": shape for name, shape in manifest("diffusion-decoder-vae").items() if not name.startswith(VAE_ENCODER_PREFIXES)}
    components["decoder"] = {**vae, **{f"unet.{name}": shape for name, shape in manifest("diffusion-decoder-unet").items()}}
    return components


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((MANIFESTS / f"{name}.json").read_text("utf-8")).items()}


def table_row(used: Mapping[str, Shapes], itemsize: int) -> tuple[int, int, int]:
    """Bytes with all networks, with those of the largest stage, and with the largest layer beside the small tensors of a stage."""
    stages: dict[str, list[int]] = {}
    streamed: dict[str, list[int]] = {}
    for part, shapes in used.items():
        for name, shape in shapes.items():
            nbytes = torch.Size(shape).numel() * itemsize
            stages.setdefault(STAGE_OF[part], []).append(nbytes)
            if "embed_tokens" not in name:  # a mapping of the file, of which rows are read
                streamed.setdefault(STAGE_OF[part], []).append(nbytes)
    layer = max(max(sizes) + sum(nbytes for nbytes in sizes if nbytes < KEPT_BYTES) for sizes in streamed.values())
    return sum(map(sum, stages.values())), max(map(sum, stages.values())), layer


if __name__ == "__main__":
    main()
