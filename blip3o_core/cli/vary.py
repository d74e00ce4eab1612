"""Draw variations of pictures."""

import argparse
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from .drawing import (
    Job,
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

if TYPE_CHECKING:
    from PIL import Image

EXAMPLES = """examples:
  blip3o vary photo.jpg --num-images 4 --output variations/
  blip3o vary photo.jpg --strength 0.3 --seed 7 --vision-encoder eva_clip_vision_tower --output close.png

The embedding of the picture is noised by the strength and sampled again: 0.3 stays close, 1 keeps only what the model
understood of it and needs no EVA-CLIP tower.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", type=Path, metavar="IMAGE", help="pictures to vary; their files stay as they are")
    parser.add_argument("--strength", type=float, default=0.6, metavar="X", help="how far from the picture, 0..1 (default: %(default)s)")
    add_model_arguments(parser)
    add_vision_encoder_argument(parser)
    add_output_arguments(parser, per="given picture")
    add_embedding_arguments(parser)
    add_decoder_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError; everything that can be checked is checked before weights are read."""
    require_strength(args.strength)
    images = load_pictures(args.image)
    jobs = plan_jobs(args, [f"{path.stem} varied" for path in args.image])
    with ProgressBars() as bars:
        pipe = open_pipeline(args, bars, args.vision_encoder)
        shared = embedding_settings(args, pipe) | decoder_settings(args, pipe)
        settings = shared | {"strength": args.strength}
        pipe.check_generate([], seeds=[job.seed for job in jobs], **shared)
        if args.strength < 1:
            pipe.require_vision_encoder()

        def draw(batch: list[Job]) -> list["Image.Image"]:
            groups = [(images[index], [job.seed for job in group]) for index, group in itertools.groupby(batch, lambda job: job.index)]
            return [picture for image, seeds in groups for picture in pipe.vary([image], seeds=seeds, on_step=bars.on_step, **settings)]

        draw_jobs(args, pipe, bars, jobs, draw=draw,
                  recipe=lambda job: {"command": "vary", "source": args.image[job.index].name, **settings})  # fmt: skip
