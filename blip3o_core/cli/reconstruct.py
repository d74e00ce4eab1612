"""Draw pictures from their own embeddings: what the model keeps of them."""

import argparse
from pathlib import Path

from .drawing import add_decoder_arguments, add_output_arguments, decoder_settings, draw_jobs, load_pictures, plan_jobs
from .options import add_model_arguments, add_vision_encoder_argument, open_pipeline
from .progress import ProgressBars

EXAMPLES = """examples:
  blip3o reconstruct photo.jpg --output again.png
  blip3o reconstruct a.jpg b.jpg --num-images 4 --vision-encoder eva_clip_vision_tower --output pictures/

The short side is brought to 448 pixels and the centre square is encoded, as in training.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", nargs="+", type=Path, metavar="IMAGE", help="pictures to encode and draw again")
    add_model_arguments(parser, loras=False)
    add_vision_encoder_argument(parser)
    add_output_arguments(parser, per="given picture")
    add_decoder_arguments(parser, zero_image=True)


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError; everything that can be checked is checked before weights are read."""
    images = load_pictures(args.image)
    jobs = plan_jobs(args, [f"{path.stem} again" for path in args.image])
    with ProgressBars() as bars:
        pipe = open_pipeline(args, bars, args.vision_encoder)
        settings = decoder_settings(args, pipe, reconstructing=True)
        decoding = {name.removeprefix("decoder_"): value for name, value in settings.items()}
        pipe.check_generate([], seeds=[job.seed for job in jobs], steps=1, guidance_scale=1, solver="euler",
                            **settings | {"negative": "zeros"})  # fmt: skip
        draw_jobs(
            args, pipe, bars, jobs,
            draw=lambda batch: pipe.reconstruct([images[job.index] for job in batch], seeds=[job.seed for job in batch],
                                                on_step=bars.on_step, **decoding),
            recipe=lambda job: {"command": "reconstruct", "source": args.image[job.index].name, **settings},
        )  # fmt: skip
