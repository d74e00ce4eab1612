"""Ask about pictures, or about anything."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ..presets import PRESETS, build_question
from .drawing import load_pictures
from .options import add_answer_arguments, add_model_arguments, answer_settings, memory_errors, open_pipeline
from .progress import ProgressBars

PRESET_LIST = "\n".join(f"  {name:<18}{preset.title}" for name, preset in PRESETS.items())
EXAMPLES = f"""examples:
  blip3o ask "What color is the car?" --image car.jpg
  blip3o ask "What has changed?" --image before.png --image after.png --max-pixels 500000
  blip3o ask --image page.png --preset ocr > page.txt
  blip3o ask "Only count the dogs." --image park.jpg --preset count --json
  blip3o ask "Write a haiku about rain" --temperature 0.8 --seed 3

presets:
{PRESET_LIST}

The answer alone is printed on standard output, word by word on a terminal. What is typed is always plain text: tokens like
<|im_end|> or <|image_pad|> in it have no effect. Of an animation the first frame is shown.
"""

MEMORY_ADVICE = "Lower --max-pixels or give fewer pictures."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="with a preset: added to its text, may be left out")
    parser.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                        help="a picture to look at; may be given several times")
    parser.add_argument("--preset", metavar="NAME", help="a ready-made question, see below")
    add_model_arguments(parser)
    add_answer_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object: answer, question, images, settings, tokens, seconds")


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError; everything that can be checked is checked before weights are read."""
    question = build_question(args.preset, args.question)
    settings = answer_settings(args)
    images = load_pictures(args.image)
    with ProgressBars() as bars:
        pipe = open_pipeline(args, bars)
        pipe.backbone, pipe.output_head  # noqa: B018 -- loaded here, so that the seconds are those of the answer
        if images:
            pipe.vision_tower  # noqa: B018
        began = time.monotonic()
        with AnswerPrinter(sys.stdout.isatty() and not args.json) as printer, memory_errors(pipe.device, "answering", MEMORY_ADVICE):
            ids = pipe.ask(question, images=images, system=args.system, on_token=printer.on_token, return_ids=True, **settings)
            answer = pipe.tokenizer.text(ids)
            if not args.json:
                printer.finish(answer)
        if args.json:
            model = {key: value for key, value in pipe.describe().items() if key != "decoder"}
            print(json.dumps({
                "answer": answer, "question": question, "images": [str(path) for path in args.image],
                "settings": {**settings, "preset": args.preset, "system": args.system, **model},
                "tokens": len(ids), "seconds": round(time.monotonic() - began, 3),
            }, ensure_ascii=False))  # fmt: skip


class AnswerPrinter(contextlib.AbstractContextManager):
    """Prints an answer on stdout: piece by piece if `streaming`, else at the end. Leaves the cursor at the start of a line."""

    def __init__(self, streaming: bool) -> None:
        self.on_token: Callable[[str], None] | None = self._print if streaming else None
        self._printed = ""

    def finish(self, answer: str) -> None:
        """What was not streamed: everything, or half a character at the end."""
        print(answer[len(self._printed) :], flush=True)
        self._printed = ""

    def __exit__(self, *_: object) -> None:
        if self._printed:  # stopped in the middle
            print(flush=True)

    def _print(self, piece: str) -> None:
        print(piece, end="", flush=True)
        self._printed += piece
