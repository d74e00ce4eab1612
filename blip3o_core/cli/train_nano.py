"""Train nano, the small model in this package, from nothing."""

import argparse
import logging
from pathlib import Path

EXAMPLES = """examples:
  blip3o train-nano --output nano/ --jobs 2
  blip3o train-nano --output quick/ --steps 20 --samples 200       the whole way in minutes; draws nothing sensible

Draws the training data, makes an untrained checkpoint and trains the stages of blip3o_core/recipes/nano: CLIP encoder, VAE, decoder,
backbone, then diffusion transformer. Takes hours on a few CPU cores. Ctrl-C stops it after
the step in progress; the same command goes on from there. The result is nano/model, a checkpoint like any other.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for data, stages and model; the same one goes on")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of data, start values and training (default: %(default)s)")
    parser.add_argument("--device", default="auto", help='"cpu", "cuda" (default: %(default)s)')
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="stages that run side by side, sharing the CPU's cores "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--workers", type=int, metavar="N", help="processes that draw the training data (default: one per core)")
    parser.add_argument("--steps", type=int, metavar="N", help="of every stage, in place of what its recipe says")
    parser.add_argument("--no-scores", action="store_true", help="don't measure the model in the end")
    parser.add_argument("--samples", type=int, metavar="N", help="at most so many per task")


def run(args: argparse.Namespace) -> int:
    """-> exit status: 0, or 128 + the signal that stopped it. Raises Blip3oError."""
    logging.getLogger("blip3o_core").setLevel(logging.INFO)
    from ..nano.training import train_nano

    stopped = train_nano(args.output, seed=args.seed, device=args.device, jobs=args.jobs, steps=args.steps, samples=args.samples,
                         workers=args.workers, scores=not args.no_scores and args.steps is None)  # fmt: skip
    return 128 + stopped if stopped else 0
