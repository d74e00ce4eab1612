"""Measure how fast each stage is on this machine, next to a plain baseline in the same run."""

import argparse
import json
import sys
from typing import Any

from ..errors import InputError
from .options import add_model_arguments, open_pipeline
from .progress import ProgressBars

EXAMPLES = """examples:
  blip3o bench
  blip3o bench --model BLIP3o-Model-4B --device cuda --batch 1 --batch 4 --json > bench.json
  blip3o bench --stage dit-sample --reference-steps 500     # also the error of each solver

The column "ratio" is the speed next to the plain way: one picture at a time, nothing kept from step to step, both branches of guidance in
full, no key-value cache. All variants of a stage take turns in the same run; times are medians. Nothing is drawn or written.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from ..bench.names import STAGES

    add_model_arguments(parser, loras=False)
    parser.add_argument("--stage", action="append", choices=STAGES, help="measure this stage only; may be given several times")
    parser.add_argument("--batch", action="append", type=int, metavar="N", help="pictures or prompts at once; may be given several times "
                        "(default: 1 and 4)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed rounds of each variant (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="rounds before them (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="Euler steps of the embedding (default: %(default)s)")
    parser.add_argument("--reference-steps", type=int, default=0, metavar="N", help="also measure the error of sampled embeddings "
                        "against a solution of so many network calls, such as 500 (default: no error)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError."""
    import torch

    from ..bench.names import STAGES
    from ..bench.stages import BenchOptions, measure

    batches = tuple(args.batch or (1, 4))
    if min(*batches, args.rounds, args.steps, 1) < 1 or args.warmup < 0 or args.reference_steps < 0:
        raise InputError("--batch, --rounds and --steps must be at least 1, --warmup and --reference-steps at least 0.")
    options = BenchOptions(args.rounds, args.warmup, batches, args.steps, args.reference_steps)
    found = []
    with ProgressBars() as bars:
        pipe = open_pipeline(args, bars)
        about = {**pipe.describe(), "threads": torch.get_num_threads(), "rounds": args.rounds, "steps": args.steps,
                 "reference_steps": args.reference_steps}  # fmt: skip
        for measurement in measure(lambda: open_pipeline(args, bars), args.stage or STAGES, options, bars.on_round):
            found.append(measurement)
            if not args.json:
                bars.write(line(measurement) if len(found) > 1 else f"{heading(about)}\n{line(measurement)}")
    if args.json:
        json.dump({**about, "measurements": [vars(measurement) for measurement in found]}, sys.stdout, indent=1)
        print()


def heading(about: dict[str, Any]) -> str:
    """What was measured, and the head of the table."""
    told = ", ".join(f"{name} {value}" for name, value in about.items() if value != "")
    return f"{told}\n\n{'stage':<16}{'variant':<20}{'batch':>6}{'steps':>6}{'seconds':>11}  {'speed':<22}{'ratio':>6}{'error':>9}"


def line(measurement) -> str:
    """A row of the table."""
    rate = measurement.items / measurement.seconds
    speed = f"{rate:.3g} {measurement.unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{measurement.unit}"
    if measurement.nbytes:
        speed = f"{measurement.nbytes / measurement.seconds / 2**20:.0f} MiB/s"
    ratio = "" if measurement.ratio is None else f"{measurement.ratio:.2f}"
    error = "" if measurement.error is None else f"{measurement.error:.4f}"
    return (f"{measurement.stage:<16}{measurement.variant:<20}{measurement.batch:>6}{measurement.steps or '':>6}"
            f"{measurement.seconds:>11.4g}  {speed:<22}{ratio:>6}{error:>9}")  # fmt: skip
