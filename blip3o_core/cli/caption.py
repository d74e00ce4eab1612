"""Write a caption beside every picture of a folder."""

import argparse
import sys
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import remove_stale_files, require_writable, write_text
from ..presets import build_question
from .ask import MEMORY_ADVICE, PRESET_LIST
from .options import add_answer_arguments, add_model_arguments, answer_settings, memory_errors, open_pipeline
from .progress import ProgressBars

EXAMPLES = f"""examples:
  blip3o caption photos/ --model BLIP3o-Model-4B
  blip3o caption photos/ --recursive --preset tags --trigger "xyz style"
  blip3o caption scans/ --preset ocr --max-new-tokens 2000
  blip3o caption photos/ --question "What is the bird on this picture called?" --overwrite

presets:
{PRESET_LIST}

Every picture NAME.jpg gets NAME.txt. Pictures that have one are skipped, so a run that was stopped goes on where it was when it is
started again. A caption is written at once or not at all. Pictures that can't be read are named at the end, and the exit status is 1.
"""

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".tga"))
KEEP_LINES = frozenset(("ocr", "chart_to_table", "count", "reasoning", "json"))  # other answers become one line, as trainers read it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with pictures")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--preset", default="detailed_caption", metavar="NAME", help="what to write, see below (default: %(default)s)")
    what.add_argument("--question", metavar="TEXT", help="your own question in place of a preset")
    parser.add_argument("--trigger", metavar="TEXT", help='put "TEXT, " in front of every caption')
    parser.add_argument("--recursive", action="store_true", help="also the folders inside")
    parser.add_argument("--overwrite", action="store_true", help="replace captions that exist")
    add_model_arguments(parser)
    add_answer_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError for wrong arguments before weights are read, and InputError at the end if pictures failed."""
    question = build_question(args.preset if args.question is None else None, args.question)
    settings = answer_settings(args)
    pictures = find_pictures(args.folder, args.recursive)
    failures = shared_names(pictures)
    own = [path for path in pictures if path not in failures]
    todo = [path for path in own if args.overwrite or not path.with_suffix(".txt").exists()]
    written: list[Path] = []
    try:
        if todo:
            write_captions(args, todo, question, settings, written, failures)
    finally:
        if written or failures or not todo:
            for path, reason in failures.items():
                print(reason if reason.startswith(str(path)) else f"{path}: {reason}", file=sys.stderr)
            print(f"{len(written)} captions written, {len(own) - len(todo)} were there, {len(failures)} failed")
    if failures:
        raise InputError(f"{len(failures)} of {len(pictures)} pictures got no caption; they are named above.")


def write_captions(
    args: argparse.Namespace, pictures: list[Path], question: str, settings: dict[str, Any], written: list[Path], failures: dict[Path, str]
) -> None:
    """Picture after picture, with a bar on stderr. Fills `written`, and `failures` with pictures and reasons.

    Raises: CheckpointError if the model can't see, OutputError if a caption can't be written.
    """
    from ..images import load_image

    folders = {path.parent for path in pictures}
    require_writable(folders, args.folder)
    remove_stale_files(folders)
    one_line = args.question is None and args.preset not in KEEP_LINES
    with ProgressBars() as bars:
        pipe = open_pipeline(args, bars)
        pipe.backbone, pipe.output_head, pipe.vision_tower  # noqa: B018 -- loaded here, so that the rate is that of the pictures
        bars.on_item("captions", 0, len(pictures))
        for done, path in enumerate(pictures, start=1):
            try:
                with memory_errors(pipe.device, f"looking at {path}", MEMORY_ADVICE):
                    answer = pipe.ask(question, images=[load_image(path)], system=args.system, **settings).strip()
                if not answer:
                    raise InputError("the model wrote nothing. Ask in another way, or set --temperature.")
            except InputError as error:
                failures[path] = str(error)
            else:
                caption = " ".join(answer.split()) if one_line else answer
                write_text(path.with_suffix(".txt"), (f"{args.trigger}, {caption}" if args.trigger else caption) + "\n")
                written.append(path)
            bars.on_item("captions", done, len(pictures))


def find_pictures(folder: Path, recursive: bool) -> list[Path]:
    """Sorted; hidden files are left out. Raises InputError if there are none."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder. Give a folder with pictures.")
    try:
        found = sorted(path for path in (folder.rglob("*") if recursive else folder.iterdir())
                       if path.suffix.lower() in SUFFIXES and path.is_file()
                       and not any(part.startswith(".") for part in path.relative_to(folder).parts))  # fmt: skip
    except OSError as error:
        raise InputError(f"{folder}: can't be read ({error.strerror or error}). Check its permissions.") from error
    if not found:
        raise InputError(f"{folder}: holds no pictures{'' if recursive else ' itself; --recursive looks into the folders inside'}.")
    return found


def shared_names(pictures: list[Path]) -> dict[Path, str]:
    """Pictures whose caption would be that of another picture (a.jpg and a.png have one a.txt) -> what to do."""
    owners: dict[Path, Path] = {}
    shared = {}
    for path in pictures:
        owner = owners.setdefault(path.with_suffix(".txt"), path)
        if owner is not path:
            shared[path] = f"shares {path.with_suffix('.txt').name} with {owner.name}. Rename one of them."
    return shared
