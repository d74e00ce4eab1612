"""Writes a checkpoint of the published names and shapes with made-up weights, to measure memory and speed without a download.

    python benchmarks/synthetic_checkpoint.py /tmp/synthetic-4b --size 4b

bfloat16, without EVA-CLIP and without a decoder: 8.9 GB for 4B, 17 GB for 8B. The tokenizer is the tiny one of the tests.
"""

import argparse
import json
import math
import shutil
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from blip3o_core.checkpoint.save import Deferred, write_safetensors
from blip3o_core.checkpoint.shards import TensorEntry
from blip3o_core.variants.blip3o import split_components

TESTS = Path(__file__).parents[1] / "tests" / "data"
TINY = TESTS / "sdxl" / "checkpoint"
SIZES = {
    "4b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2),
    "8b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
}
VOCABULARY = 151668
SKIPPED = ("vision_encoder", "skipped")
BLOCK = 2**22  # different random numbers; they repeat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="is made; must not exist")
    parser.add_argument("--size", choices=SIZES, default="4b")
    args = parser.parse_args()
    args.folder.mkdir(parents=True)
    for file in TINY.iterdir():
        if file.is_file() and file.suffix in (".json", ".txt") and "index" not in file.name:
            shutil.copy(file, args.folder)
    config = json.loads((TINY / "config.json").read_text("utf-8")) | SIZES[args.size]
    config |= {"vocab_size": VOCABULARY, "max_position_embeddings": 32768,
               "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}}  # fmt: skip
    (args.folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")

    shapes = json.loads((TESTS / "manifests" / f"blip3o-{args.size}.json").read_text("utf-8"))
    entries = {name: TensorEntry(name, args.folder, torch.bfloat16, tuple(shape), 0, 0) for name, shape in shapes.items()}
    wanted = {entry.name for part, own in split_components(entries, args.folder).items() if part not in SKIPPED for entry in own.values()}
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    tensors = {name: Deferred(tuple(shapes[name]), torch.bfloat16, partial(made_up, name, tuple(shapes[name]), block))
               for name in sorted(wanted)}  # fmt: skip
    write_safetensors(args.folder / "model.safetensors", tensors)
    print(f"{args.folder}: {len(tensors)} tensors, {sum(tensor.nbytes for tensor in tensors.values()) / 1e9:.1f} GB")


def made_up(name: str, shape: tuple[int, ...], block: Tensor) -> Tensor:
    """Norms of 1, small biases, matrices that keep the size of what passes through them."""
    count = math.prod(shape)
    if len(shape) == 1 and "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    values = block.repeat(-(-count // BLOCK))[:count].view(shape)
    return values * (0.02 if len(shape) == 1 else shape[-1] ** -0.5)


if __name__ == "__main__":
    main()
