"""Write queries and diffusion transformer without the backbone, for those who have Qwen2.5-VL already."""

import argparse
from pathlib import Path

from ..errors import InputError
from .inspect import size
from .progress import ProgressBars

EXAMPLES = """examples:
  blip3o split BLIP3o-Model-4B --output BLIP3o-4B-split
  blip3o generate "a red fox" --model BLIP3o-4B-split --qwen Qwen2.5-VL-3B-Instruct --decoder diffusion-decoder --output fox.png

The split has 1.4 billion parameters (2.7 GB in bfloat16) in place of 5 or 9. It works with the very Qwen2.5-VL that the model was trained
on and with no other: fingerprints are compared. The decoder is not in it; name its folder with --decoder.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")


def run(args: argparse.Namespace) -> None:
    """Raises CheckpointError, InputError, OutputError."""
    from ..variants import split
    from ..variants.blip3o import Blip3oCheckpoint

    checkpoint = Blip3oCheckpoint.open(args.model)
    if args.output.resolve() == checkpoint.folder.resolve():
        raise InputError(f"--output {args.output} is the model itself. Give another folder.")
    with ProgressBars() as bars:
        nbytes = split.write_split(checkpoint.folder, checkpoint.config, checkpoint.components, args.output, overwrite=args.overwrite,
                                   rows_from=checkpoint.tokenizer.image_start_id, on_write=bars.on_write)  # fmt: skip
    print(f"{args.output}: {size(nbytes)}; use it with --model {args.output} --qwen FOLDER of the Qwen2.5-VL-Instruct it was trained on")
