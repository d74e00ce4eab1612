"""Draw pictures from prompts."""

import argparse
import sys
from pathlib import Path

from ..errors import InputError
from .drawing import (
    add_decoder_arguments,
    add_embedding_arguments,
    add_output_arguments,
    decoder_settings,
    draw_jobs,
    embedding_settings,
    plan_jobs,
)
from .options import add_model_arguments, open_pipeline
from .progress import ProgressBars

EXAMPLES = """examples:
  blip3o generate "a red fox in fresh snow" --model BLIP3o-Model-4B --output fox.png
  blip3o generate "a red fox" "a blue bird" --num-images 4 --seed 100 --output pictures/
  blip3o generate --prompts prompts.txt --output pictures/ --json > recipes.jsonl

Pictures of one prompt get the seeds S, S+1, S+2, ... A seed gives the same picture alone, in any batch and on any run.
The model can also be named by the environment variable BLIP3O_MODEL.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what the picture should show; several are drawn in turn")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt per line (- for standard input)")
    add_model_arguments(parser)
    add_output_arguments(parser, per="prompt")
    add_embedding_arguments(parser)
    add_decoder_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError; everything that can be checked is checked before weights are read."""
    prompts = read_prompts(args)
    jobs = plan_jobs(args, prompts)
    with ProgressBars() as bars:
        pipe = open_pipeline(args, bars)
        settings = embedding_settings(args, pipe) | decoder_settings(args, pipe)
        pipe.check_generate(prompts, seeds=[job.seed for job in jobs], **settings)
        draw_jobs(
            args, pipe, bars, jobs,
            draw=lambda batch: pipe.generate([prompts[job.index] for job in batch], seeds=[job.seed for job in batch],
                                             on_step=bars.on_step, **settings),
            recipe=lambda job: {"command": "generate", "prompt": prompts[job.index], **settings},
        )  # fmt: skip


def read_prompts(args: argparse.Namespace) -> list[str]:
    """Prompts of the command line, then of the file; blank lines of the file are left out."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        try:
            text = sys.stdin.read() if args.prompts == "-" else Path(args.prompts).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{args.prompts}: can't be read as UTF-8 text ({error}). Give a file with one prompt per line.") from error
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise InputError('no prompt was given. Write one in quotes, or a file: --prompts FILE.')
    return prompts
