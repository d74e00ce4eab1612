"""Draw pictures from prompts."""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, OutputError
from .options import add_model_arguments, required_model
from .progress import ProgressBars

EXAMPLES = """examples:
  blip3o generate "a red fox in fresh snow" --model BLIP3o-Model-4B --output fox.png
  blip3o generate "a red fox" "a blue bird" --num-images 4 --seed 100 --output pictures/
  blip3o generate --prompts prompts.txt --output pictures/ --json > recipes.jsonl

Pictures of one prompt get the seeds S, S+1, S+2, ... A seed gives the same picture alone, in any batch and on any run.
The model can also be named by the environment variable BLIP3O_MODEL.
"""

IMAGE_SUFFIXES = (".png",)
SLUG_LENGTH = 40


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    prompt: str
    seed: int
    path: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what the picture should show; several are drawn in turn")
    parser.add_argument("--prompts", metavar="FILE", help="a text file with one prompt per line (- for standard input)")
    add_model_arguments(parser)
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="DIR|FILE",
                        help="a .png file for one picture, else a folder (default: %(default)s); nothing is overwritten")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output file")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures per prompt (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first picture (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N",
                        help="pictures drawn at once: faster on a large GPU, takes more memory (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="steps of the embedding, 1..1000 (default: %(default)s)")
    parser.add_argument("--guidance-scale", type=float, default=3.0, metavar="G",
                        help="how strictly the embedding follows the prompt; 1 is no guidance (default: %(default)s)")
    parser.add_argument("--solver", default="euler", choices=("euler", "ab2", "heun"),
                        help="of the embedding: euler is the reference; ab2 is second order at the same cost, heun at twice "
                        "the cost (default: %(default)s)")
    parser.add_argument("--decoder-steps", type=int, default=50, metavar="N", help="steps of the picture, 1..999 (default: %(default)s)")
    parser.add_argument("--decoder-guidance-scale", type=float, default=3.0, metavar="G",
                        help="guidance of the picture; 1 is none and twice as fast (default: %(default)s)")
    parser.add_argument("--negative", choices=("null_prompt", "zeros"), default="null_prompt",
                        help="what the picture is guided away from: a sample of the null prompt as in the reference, or zeros, "
                        "which saves one sampling per run (default: %(default)s)")
    parser.add_argument("--width", type=int, default=1024, help="pixels, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--height", type=int, default=1024, help="pixels, a multiple of 8 (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON line per picture: file, prompt, seed, all settings")


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError; everything that can be checked is checked before weights are read."""
    if args.num_images < 1 or args.batch_size < 1:
        raise InputError(f"--num-images {args.num_images} and --batch-size {args.batch_size} must be at least 1.")
    prompts = read_prompts(args)
    jobs = plan_jobs(prompts, args)

    import torch

    from ..pipelines.blip3o import Blip3oPipeline

    with ProgressBars() as bars:
        pipe = Blip3oPipeline.from_pretrained(
            required_model(args), device=args.device, dtype=args.dtype, decoder=args.decoder, on_load=bars.on_load
        )
        settings = {
            "steps": args.steps, "guidance_scale": args.guidance_scale, "solver": args.solver,
            "decoder_steps": args.decoder_steps, "decoder_guidance_scale": args.decoder_guidance_scale,
            "negative": args.negative, "width": args.width, "height": args.height,
        }  # fmt: skip
        pipe.check_generate(prompts, seeds=[job.seed for job in jobs], **settings)
        prepare_output(args.output, jobs)
        for start in range(0, len(jobs), args.batch_size):
            batch = jobs[start : start + args.batch_size]
            bars.title = f"picture {start + 1}/{len(jobs)}" if len(batch) == 1 else f"pictures {start + 1}-{start + len(batch)}/{len(jobs)}"
            began = time.monotonic()
            try:
                images = pipe.generate([job.prompt for job in batch], seeds=[job.seed for job in batch], on_step=bars.on_step, **settings)
            except torch.OutOfMemoryError as error:
                raise InputError(f"out of memory on {pipe.device} while drawing {len(batch)} at {args.width} x {args.height} "
                                 f"({str(error).splitlines()[0]}). Lower --batch-size, --width and --height.") from error
            seconds = (time.monotonic() - began) / len(batch)
            for job, image in zip(batch, images, strict=True):
                recipe = {"prompt": job.prompt, "seed": job.seed, **settings, **pipe.describe()}
                save_png(image, job.path, recipe)
                report = {"file": str(job.path), **recipe, "seconds": round(seconds, 3)}
                bars.write(json.dumps(report, ensure_ascii=False) if args.json else str(job.path))


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


def plan_jobs(prompts: list[str], args: argparse.Namespace) -> list[Job]:
    """Prompt, seed and file of every picture. Raises OutputError if a file would be overwritten."""
    seeded = [(prompt, args.seed + index) for prompt in prompts for index in range(args.num_images)]
    if args.output.suffix.lower() in IMAGE_SUFFIXES and not args.output.is_dir():
        if len(seeded) > 1:
            raise OutputError(f"{len(seeded)} pictures don't fit in the one file {args.output}. Give a folder.")
        if args.output.exists() and not args.overwrite:
            raise OutputError(f"{args.output} exists. Give another name, or --overwrite to replace it.")
        return [Job(*seeded[0], args.output)]
    if args.output.suffix.lower() in (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"):
        raise OutputError(f"{args.output}: pictures are written as .png, which keeps their recipe. Give a .png name or a folder.")
    if args.output.exists() and not args.output.is_dir():
        raise OutputError(f"{args.output} is a file, not a folder. Give a folder or a name that ends in .png.")
    numbers = free_numbers(args.output)
    return [Job(prompt, seed, args.output / f"{next(numbers):05d}_{slug(prompt)}_{seed}.png") for prompt, seed in seeded]


def free_numbers(folder: Path) -> Iterator[int]:
    """Counts up from behind the highest numbered picture in `folder`."""
    taken = [int(match[1]) for path in (folder.glob("*.png") if folder.is_dir() else ()) if (match := re.match(r"(\d+)_", path.name))]
    number = max(taken, default=0)
    while True:
        number += 1
        yield number


def slug(prompt: str) -> str:
    """A short file name from a prompt: letters and digits only."""
    return re.sub(r"[^\w]+", "-", prompt.lower())[:SLUG_LENGTH].strip("-_") or "picture"


def prepare_output(output: Path, jobs: list[Job]) -> None:
    """Makes the folders, so that a wrong place is found before the work is done."""
    try:
        for folder in {job.path.parent for job in jobs}:
            folder.mkdir(parents=True, exist_ok=True)
            if not os.access(folder, os.W_OK):
                raise PermissionError(13, "no permission to write")
    except OSError as error:
        raise OutputError(f"{output}: can't write there ({error.strerror}). Give another --output.") from error


def save_png(image, path: Path, recipe: dict) -> None:
    """Writes under a temporary name and renames: a file with the final name is always whole."""
    from PIL.PngImagePlugin import PngInfo

    metadata = PngInfo()
    metadata.add_itxt("blip3o", json.dumps(recipe, ensure_ascii=False))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        image.save(temporary, format="PNG", pnginfo=metadata)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written ({error.strerror or error}). Pictures written before it are kept.") from error
    finally:
        temporary.unlink(missing_ok=True)
