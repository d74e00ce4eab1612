"""Change a picture as told; several instructions are applied one after the other."""

import argparse
from pathlib import Path

from ..errors import InputError
from .drawing import (
    add_decoder_arguments,
    add_embedding_arguments,
    add_output_arguments,
    decoder_settings,
    draw_jobs,
    embedding_settings,
    load_pictures,
    plan_jobs,
    require_strength,
)
from .options import add_model_arguments, add_vision_encoder_argument, open_pipeline
from .progress import ProgressBars

EXAMPLES = """examples:
  blip3o edit car.jpg "Make the sky purple" --output purple.png
  blip3o edit car.jpg "Make it night" "Add falling snow" --num-images 4 --seed 100 --output edits/
  blip3o edit room.jpg "Put the lamp of the second picture on the table" --image lamp.jpg
  blip3o edit car.jpg "Make it red" --strength 0.7 --vision-encoder eva_clip_vision_tower

The picture is squeezed to 448 x 448 for the model, as in the published pipeline. Each instruction sees the result of the one before it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE", help="the picture to change; its file stays as it is")
    parser.add_argument("instruction", nargs="+", metavar="INSTRUCTION", help="what to change; several are a chain of edits")
    parser.add_argument("--image", dest="further_images", type=Path, action="append", default=[], metavar="FILE",
                        help="another picture that the instructions may refer to; may be given several times")
    parser.add_argument("--strength", type=float, default=1.0, metavar="X", help="below 1 starts from the embedding of the picture "
                        "and keeps more of it; needs the EVA-CLIP tower (default: %(default)s)")  # fmt: skip
    parser.add_argument("--positions", choices=("arange", "mrope"), default="arange", help="how image tokens are counted: arange as "
                        "in the reference, mrope by row and column as in understanding (default: %(default)s)")  # fmt: skip
    add_model_arguments(parser)
    add_vision_encoder_argument(parser)
    add_output_arguments(parser, per="chain")
    add_embedding_arguments(parser)
    add_decoder_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError; everything that can be checked is checked before weights are read."""
    for instruction in args.instruction:
        if not instruction.strip():
            raise InputError("an instruction is empty. Say what to change.")
    require_strength(args.strength)
    images = load_pictures([args.image, *args.further_images])
    jobs = plan_jobs(args, [f"{args.image.stem} {' '.join(args.instruction)}"])
    with ProgressBars() as bars:
        pipe = open_pipeline(args, bars, args.vision_encoder)
        shared = embedding_settings(args, pipe) | decoder_settings(args, pipe)
        settings = shared | {"strength": args.strength, "positions": args.positions}
        recipe = {"command": "edit", "source": args.image.name, "instructions": args.instruction, **settings}
        if args.further_images:
            recipe["further_sources"] = [path.name for path in args.further_images]
        pipe.check_generate(args.instruction, seeds=[job.seed for job in jobs], **shared)
        if args.strength < 1:
            pipe.require_vision_encoder()
        draw_jobs(
            args, pipe, bars, jobs,
            draw=lambda batch: pipe.edit([images] * len(batch), [args.instruction] * len(batch), seeds=[job.seed for job in batch],
                                         on_step=bars.on_step, **settings),
            recipe=lambda job: recipe,
        )  # fmt: skip
