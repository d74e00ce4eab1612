"""Fine-tune with LoRA, or train whole networks."""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import Blip3oError, TrainingError, name_too_long

EXAMPLES = """examples:
  python -m blip3o_core.train lora.toml
  python -m blip3o_core.train lora.toml train.steps=2000 output.folder=runs/second
  python -m blip3o_core.train model.path=BLIP3o-Model-4B data.0.path=pictures/ output.folder=runs/first --dry-run
  python -m blip3o_core.train lora.toml output.resume=latest
  accelerate launch --num_processes 4 -m blip3o_core.train lora.toml

A folder of pictures, each with a .txt of the same name, is enough to start. --print-config shows every key with its meaning.
Ctrl-C or SIGTERM finishes the update, saves and exits (130 or 143); output.resume=latest goes on from there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", metavar="CONFIG.toml", help="settings of the run; may be left out if overrides say all")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that replace those of the file")
    parser.add_argument("--print-config", action="store_true", help="print all settings with their documentation as TOML, and end")
    parser.add_argument("--dry-run", action="store_true", help="load data and model, print the plan (samples, steps, what trains, "
                        "memory, disk), and train nothing")  # fmt: skip


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Like `parse_args`, but settings may also stand behind options, which argparse doesn't expect."""
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def run(args: argparse.Namespace) -> int:
    """-> exit status: 0, or 128 + the signal that stopped it. Raises Blip3oError."""
    from .config import load_config, print_config

    logging.getLogger("blip3o_core").setLevel(logging.INFO)
    file, overrides = args.config, list(args.overrides)
    if file is not None and "=" in file and not Path(file).is_file():
        file, overrides = None, [file, *overrides]
    config = load_config(file, overrides)
    if args.print_config:
        print(print_config(config), end="")
        return 0
    from ..runtime import first_line, is_out_of_memory

    try:
        if args.dry_run:
            from .plan import plan

            print(plan(config))
            return 0
        from .run import run_training

        stopped = run_training(config)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
        raise TrainingError(f"out of memory ({reason}). What was saved is intact. Less is taken by "
                            "train.gradient_checkpointing=true, by cache.enabled=true, and by a lower train.batch_size with a higher "
                            "train.gradient_accumulation; --dry-run estimates it.") from error  # fmt: skip
    return 128 + stopped if stopped else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The module as a command. Returns the exit status; errors that the user can mend are one message on stderr and status 1."""
    parser = argparse.ArgumentParser(prog="python -m blip3o_core.train", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add_arguments(parser)
    args = parse(parser, argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        return run(args)
    except Blip3oError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if (message := name_too_long(error)) is None:
            raise
        print(f"train: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train: stopped at once; the newest checkpoint is kept.", file=sys.stderr)
        return 128 + signal.SIGINT
