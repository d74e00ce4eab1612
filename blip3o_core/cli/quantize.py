"""Write a copy whose language model takes half or a quarter of the memory."""

import argparse
from pathlib import Path

from .inspect import size
from .progress import ProgressBars

EXAMPLES = """examples:
  blip3o quantize BLIP3o-Model-8B --format int8 --output BLIP3o-Model-8B-int8
  blip3o quantize BLIP3o-Model-8B --format int4 --output BLIP3o-Model-8B-int4
  blip3o generate "a red fox" --model BLIP3o-Model-8B-int8 --output fox.png

fp8 and int8 halve the backbone, int4 takes 71 % off it; int8 is the most exact. Weights are converted to the compute precision layer by
layer while they run, so this saves memory, not time. Embeddings and output head have 8 bits in int4 too; diffusion transformer, vision
tower and decoder stay as they are. The folder is complete.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder, in its original precision")
    parser.add_argument("--format", required=True, choices=("fp8", "int8", "int4"), help="how matrices of the language model are stored")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")


def run(args: argparse.Namespace) -> None:
    """Raises CheckpointError, InputError, OutputError."""
    from ..variants.blip3o import Blip3oCheckpoint
    from ..variants.quantise import save_quantised

    checkpoint = Blip3oCheckpoint.open(args.model)
    before = sum(entry.nbytes for part in ("language_model", "queries") for entry in checkpoint.components[part].values())
    with ProgressBars() as bars:
        after = save_quantised(checkpoint, args.output, args.format, overwrite=args.overwrite, on_write=bars.on_write)
    print(f"{args.output}: backbone {size(after)}, {1 - after / before:.0%} less than the {size(before)} of {args.model}")
