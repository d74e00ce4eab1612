"""Download a published model by name: only the files that its tasks read, checked."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError
from .inspect import size
from .progress import ProgressBars

if TYPE_CHECKING:
    from ..hub.download import Plan

NAMES = ("4b", "8b", "eva-clip", "siglip2-sana")  # of hub.repositories, which take long to import
TASKS = ("generate", "edit", "ask", "reconstruct")
SHOWN = 10  # names of files in a message

EXAMPLES = """examples:
  blip3o download 4b                                  # size and licence first; into ./BLIP3o-Model-4B
  blip3o download 8b --dir ComfyUI/models/blip3o      # into ComfyUI/models/blip3o/BLIP3o-Model-8B
  blip3o download 4b --for generate --for edit        # without the 8.7 GB of EVA-CLIP, which only reconstruction reads
  blip3o download siglip2-sana --yes                  # without a question, for scripts
  blip3o download 4b --dry-run                        # what would be done

An interrupted download goes on where it was. Every file is compared with the hub's checksum before it gets its name. HF_TOKEN, HF_ENDPOINT
(a mirror), HF_HUB_OFFLINE and the proxy variables are respected. No other command of blip3o reaches the network.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", choices=NAMES, help="4b, 8b: the models; eva-clip: the encoder of pictures alone; siglip2-sana: the "
                        "decoder with an encoder of its own")  # fmt: skip
    parser.add_argument("--dir", type=Path, default=Path(), metavar="DIR", help="where the model's folder is made (default: here)")
    parser.add_argument("--for", dest="tasks", choices=TASKS, action="append", help="only what this task reads; may be given several times "
                        "(default: all)")  # fmt: skip
    parser.add_argument("--yes", action="store_true", help="don't ask")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be downloaded")
    parser.add_argument("--overwrite", action="store_true", help="replace files that differ from the published ones")


def run(args: argparse.Namespace) -> None:
    """Raises DownloadError, InputError, OutputError."""
    from ..hub.download import download, plan_download, require_space

    with ProgressBars() as bars:
        plan = plan_download(args.name, args.dir.expanduser(), tuple(args.tasks or TASKS), bars.on_load)
        bars.write(describe(plan))
        if args.dry_run:
            return
        if not plan.missing and not plan.different and not plan.lacks_index:
            bars.write(f"{plan.folder}: complete, every checksum is right.")
            return
        free = require_space(plan)
        if not args.yes and not _agreed(f"Download {size(plan.to_receive)} ({size(free)} are free)?"):
            raise InputError("nothing was downloaded.")
        download(plan, overwrite=args.overwrite, on_progress=bars.on_load)
        bars.write(f"{plan.folder}: complete, every checksum is right.")


def describe(plan: "Plan") -> str:
    """What, from where, under which licence, how much."""
    listing = plan.listing
    lines = [f"{listing.page} at {listing.revision[:12]}", f"licence: {listing.licence}"]
    if listing.gated:
        lines.append("access is restricted: ask for it on that page, then set HF_TOKEN")
    lines.append(f"{len(plan.files)} files of {size(plan.total)} for {', '.join(plan.tasks)}, into {plan.folder}")
    if plan.left_out:
        lines.append(f"left out, not read by these: {len(plan.left_out)} files of {size(sum(file.size for file in plan.left_out))}")
    have = plan.total - plan.to_receive
    if have:
        lines.append(f"already here: {size(have)}")
    if plan.different:
        shown = [f"  {name}: {why}" for name, why in list(plan.different.items())[:SHOWN]]
        lines += [f"{len(plan.different)} files are here with another content:", *shown]
    return "\n".join(lines)


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise InputError("--yes is needed where nobody can be asked.")
    return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")
