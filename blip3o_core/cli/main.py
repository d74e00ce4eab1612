"""`blip3o`: subcommand -> file. Heavy imports happen in the subcommand, so `--help` answers at once."""

import argparse
import io
import logging
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import Blip3oError, name_too_long
from . import (
    ask,
    bench,
    caption,
    chat,
    completion,
    convert,
    doctor,
    download,
    edit,
    evaluate,
    generate,
    inspect,
    lora,
    quantize,
    reconstruct,
    split,
    train,
    train_nano,
    vary,
)

SUBCOMMANDS = {
    "generate": generate, "edit": edit, "vary": vary, "reconstruct": reconstruct, "ask": ask, "chat": chat, "caption": caption,
    "download": download, "doctor": doctor, "inspect": inspect, "evaluate": evaluate, "bench": bench, "lora": lora, "split": split,
    "convert": convert, "quantize": quantize, "train": train, "train-nano": train_nano, "completion": completion,
}  # fmt: skip
INTERRUPTED = 130  # the shell's exit status for Ctrl-C


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    parser = argparse.ArgumentParser(
        prog="blip3o",
        description="BLIP3-o on the command line: pictures from text and pictures, text from pictures and text. Only download reaches "
        "the network.",
        epilog='example:  blip3o generate "a red fox in fresh snow" --model BLIP3o-Model-4B --output fox.png',
    )
    parser.add_argument("--version", action="version", version=f"blip3o {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in SUBCOMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=module.EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand. Returns its status (0), or 1 after an error that the user can mend, whose message is on stderr."""
    args = train.parse(build_parser(), argv)
    for stream in (sys.stdin, sys.stdout):  # a letter that the console's code page lacks must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        status = SUBCOMMANDS[args.command].run(args)
    except Blip3oError as error:
        print(f"blip3o: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("blip3o: stopped; finished files are kept.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `blip3o ... | head`
        sys.stderr.close()
        return 1
    except OSError as error:
        if (message := name_too_long(error)) is None:
            raise
        print(f"blip3o: {message}", file=sys.stderr)
        return 1
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
