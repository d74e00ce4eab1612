"""Talk with the model: text, pictures in, pictures out."""

import argparse
import contextlib
import difflib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import Blip3oError, InputError, OutputError
from ..files import require_writable, write_text
from .ask import MEMORY_ADVICE, AnswerPrinter
from .drawing import (
    DRAWING_ADVICE,
    add_decoder_arguments,
    add_embedding_arguments,
    decoder_settings,
    embedding_settings,
    free_numbers,
    load_pictures,
    numbered_path,
    save_png,
)
from .options import add_answer_arguments, add_model_arguments, answer_settings, memory_errors, open_pipeline
from .progress import ProgressBars

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines.blip3o import Blip3oPipeline

COMMANDS = """\
/image FILE    attach a picture to the next message or drawing; /image alone takes attached ones back
/draw PROMPT   draw: an edit of the newest picture of the conversation, or a new one if there is none
/save FILE     write the conversation with its pictures; /save! FILE replaces a file
/load FILE     go on with a saved conversation
/reset         start anew
/help          show this
/quit          end, as Ctrl-D
"""
EXAMPLES = f"""examples:
  blip3o chat --model BLIP3o-Model-4B
  blip3o chat --temperature 0.7 --output drawings/
  printf '%s\\n' '/image car.jpg' 'What is this?' '/draw the same at night' | blip3o chat

commands:
  {COMMANDS.strip().replace(chr(10), chr(10) + "  ")}

A message that begins with a slash is written with two: //. Empty lines are skipped. Ctrl-C stops an answer or a drawing, which
then leaves no trace in the conversation; at the prompt it ends the chat. Drawings get the seeds S, S+1, S+2, ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="DIR",
                        help="folder for drawings (default: %(default)s); nothing is overwritten")
    add_answer_arguments(parser)
    add_embedding_arguments(parser)
    add_decoder_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError for what is wrong before the first message; later errors are printed and the chat goes on."""
    answer_settings(args)
    with ProgressBars() as bars:
        pipe = open_pipeline(args, bars)
        pipe.backbone, pipe.output_head  # noqa: B018 -- loaded before the first prompt, not after the first message
        session = Session(pipe, bars, args)
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 -- input() then edits lines; Windows has none
            print("/help lists the commands, /quit ends.", file=sys.stderr)
        with contextlib.suppress(KeyboardInterrupt):  # at the prompt
            while (line := read_line()) is not None and line.strip() != "/quit":
                session.handle(line)


def read_line() -> str | None:
    """The next line of standard input without its end, None behind the last. Only a terminal is prompted."""
    if sys.stdin.isatty():
        try:
            return input("you> ")
        except EOFError:
            print(file=sys.stderr)
            return None
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


class Session:
    """One conversation and the commands on it."""

    def __init__(self, pipe: "Blip3oPipeline", bars: ProgressBars, args: argparse.Namespace) -> None:
        self.pipe = pipe
        self.bars = bars
        self.args = args
        self.chat = pipe.chat(args.system)
        self.attached: list[Image.Image] = []
        self.next_seed = args.seed
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self.attach, "/draw": self.draw, "/save": self.save, "/save!": lambda name: self.save(name, replace=True),
            "/load": self.load, "/reset": self.reset, "/help": lambda _: print(COMMANDS, end="", file=sys.stderr),
        }  # fmt: skip

    def handle(self, line: str) -> None:
        """One line of the user. Errors and Ctrl-C leave the conversation as it was; attached pictures stay attached."""
        line = line.strip()
        if not line:
            return
        try:
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line.partition(" ")
                self.command(name)(rest.strip())
            else:
                self.say(line[1:] if line.startswith("//") else line)
        except KeyboardInterrupt:
            self.failed("stopped; the conversation is as before this message.")
        except Blip3oError as error:
            self.failed(str(error))

    def command(self, name: str) -> Callable[[str], None]:
        if name not in self.commands:
            nearest = difflib.get_close_matches(name, [*self.commands, "/quit"], n=1, cutoff=0.5)
            raise InputError(f"there is no command {name:.40}. {f'Did you mean {nearest[0]}? ' if nearest else ''}/help lists all; "
                             "a message that begins with a slash is written with two.")
        return self.commands[name]

    def say(self, text: str) -> None:
        with AnswerPrinter(sys.stdout.isatty()) as printer, memory_errors(self.pipe.device, "answering", MEMORY_ADVICE):
            answer = self.chat.say(text, images=self.attached, on_token=printer.on_token, **answer_settings(self.args))
            printer.finish(answer)
        self.attached = []

    def attach(self, name: str) -> None:
        if name:
            self.attached += load_pictures([file_path(name)])
        else:
            self.attached = []
        self.note(f"{len(self.attached)} attached to the next message.")

    def draw(self, prompt: str) -> None:
        if not prompt:
            raise InputError("nothing to draw. Write: /draw PROMPT.")
        folder, seed = self.args.output, self.next_seed
        require_writable([folder], folder)
        settings = embedding_settings(self.args, self.pipe) | decoder_settings(self.args, self.pipe)
        recipe = {"command": "chat", "prompt": prompt, "seed": seed, "edit": bool(self.attached or self.chat.last_image), **settings}
        self.bars.title = ""
        with memory_errors(self.pipe.device, "drawing", DRAWING_ADVICE):
            pictures = self.chat.draw(prompt, seeds=[seed], images=self.attached, min_pixels=self.args.min_pixels,
                                      max_pixels=self.args.max_pixels, on_step=self.bars.on_step, **settings)  # fmt: skip
        self.attached = []
        self.next_seed += 1
        path = numbered_path(folder, next(free_numbers(folder)), prompt, seed)
        save_png(pictures[0], path, recipe | self.pipe.describe())
        self.bars.write(str(path))

    def save(self, name: str, *, replace: bool = False) -> None:
        path = file_path(name)
        if os.path.exists(path) and not replace:
            raise OutputError(f"{path} exists. Give another name, or replace it: /save! {name}")
        write_text(path, self.chat.to_json())
        self.note(f"saved as {path}.")

    def load(self, name: str) -> None:
        path = file_path(name)
        try:
            text = path.read_text("utf-8")
        except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a zero in the name
            raise InputError(f"{path}: can't be read as a saved conversation ({error}). Give a file that /save wrote.") from error
        try:
            self.chat = type(self.chat).from_json(self.pipe, text)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        self.attached = []
        self.note(f"{len(self.chat.messages) - 1} messages loaded from {path}.")

    def reset(self, _: str) -> None:
        self.chat, self.attached = self.pipe.chat(self.args.system), []
        self.note("the conversation is empty.")

    def failed(self, reason: str) -> None:
        self.bars.close()
        self.note(f"{reason} ({len(self.attached)} attached)" if self.attached else reason)

    def note(self, text: str) -> None:
        """About the chat, not of it: on stderr."""
        print(f"blip3o: {text}", file=sys.stderr, flush=True)


def file_path(name: str) -> Path:
    """A typed or dropped file name, which may be in quotes. Raises InputError if there is none."""
    if len(name) > 1 and name[0] == name[-1] and name[0] in "'\"":
        name = name[1:-1]
    if not name or "\0" in name:
        raise InputError("a file name is missing.")
    return Path(os.path.expanduser(name))  # unlike Path.expanduser it takes ~name.png for a name if there is no such user
