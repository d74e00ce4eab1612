"""Fine-tune with LoRA, or train whole networks."""

import argparse

from ..train import command

parse = command.parse
EXAMPLES = command.EXAMPLES.replace("python -m blip3o_core.train", "blip3o train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    command.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """-> exit status. Raises Blip3oError."""
    return command.run(args)
