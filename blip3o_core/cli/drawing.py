"""What the subcommands that draw share: options, names and recipes of the files, the loop over batches."""

import argparse
import itertools
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, OutputError
from ..files import require_writable, whole_file
from .options import memory_errors
from .progress import ProgressBars

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines.blip3o import Blip3oPipeline
    from ..variants.blip3o import DrawingDefaults

IMAGE_SUFFIXES = (".png",)
SLUG_LENGTH = 40
SOLVER_NAMES = ("dpmpp_2m", "euler", "ab2", "heun")  # of sampling.solvers.SOLVERS, which takes torch to import
OWN = "default: {} for published models, others say their own"
DRAWING_ADVICE = "Lower --batch-size, --width and --height."


@dataclass(frozen=True)
class Job:
    """One picture to draw: of which of the given prompts or pictures, with which seed, into which file."""

    index: int
    seed: int
    path: Path


def add_output_arguments(parser: argparse.ArgumentParser, *, per: str) -> None:
    """per: of what --num-images are drawn, in the help."""
    parser.add_argument("--output", type=Path, default=Path("output"), metavar="DIR|FILE",
                        help="a .png file for one picture, else a folder (default: %(default)s); nothing is overwritten")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output file")
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help=f"pictures per {per} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the first picture (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N",
                        help="pictures drawn at once: faster on a large GPU, takes more memory (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON line per picture: file, seed, all settings")


def add_embedding_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the embedding")
    group.add_argument("--solver", choices=SOLVER_NAMES, help="of the embedding: dpmpp_2m is second order, faster and closer to the exact "
                       "solution than the reference, which is euler; ab2 and heun are second order too, heun with two calls a step "
                       f"({OWN.format('dpmpp_2m')})")  # fmt: skip
    group.add_argument("--steps", type=int, metavar="N", help="steps of the embedding, 1..1000 (default: what the solver is meant for: "
                       "dpmpp_2m 12, euler 30, heun 15, ab2 20)")  # fmt: skip
    group.add_argument("--schedule", choices=("linear", "cosine"), help="how the steps are spaced (default: as the solver is meant "
                       "for: cosine for dpmpp_2m and heun, else linear)")  # fmt: skip
    group.add_argument("--guidance-scale", type=float, metavar="G",
                       help=f"how strictly the embedding follows the prompt; 1 is no guidance ({OWN.format('3.0')})")
    group.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), default=(0.0, 1.0),
                       help="noise levels in 0..1 between which guidance is used; steps outside cost half (default: 0 1, all)")


def add_decoder_arguments(parser: argparse.ArgumentParser, *, zero_image: bool = False) -> None:
    """zero_image: offer the embedding of the zero image as what pictures are guided away from."""
    group = parser.add_argument_group("the picture")
    group.add_argument("--decoder-steps", type=int, metavar="N", help=f"steps of the picture, 1..999 ({OWN.format(50)})")
    group.add_argument("--decoder-guidance-scale", type=float, metavar="G",
                       help=f"guidance of the picture; 1 is none and twice as fast ({OWN.format('3.0')})")
    choices = {"null_prompt": "a sample of the null prompt as in the reference", "zeros": "zeros, which need no sampling",
               "black_image": "the embedding of a black picture, only and always for SANA decoders"}  # fmt: skip
    if zero_image:
        choices = {"zero_image": "the embedding of an image of zeros as in the reference", **choices}
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in choices.items())
    group.add_argument("--negative", choices=tuple(choices), 
                       help=f"what the picture is guided away from: {meanings} (default: {next(iter(choices))}, or black_image)")
    group.add_argument("--width", type=int, metavar="N", help=f"pixels, a multiple of 8 ({OWN.format(1024)})")
    group.add_argument("--height", type=int, metavar="N", help=f"pixels, a multiple of 8 ({OWN.format(1024)})")


def embedding_settings(args: argparse.Namespace, pipe: "Blip3oPipeline") -> dict[str, Any]:
    """Names as in the pipeline; what was not said is the checkpoint's own. Raises InputError for values that make no sense."""
    solver, steps, schedule = pipe.sampler(args.solver, args.steps, args.schedule)
    return _chosen(args, pipe.drawing, ("guidance_scale",)) | {
        "solver": solver, "steps": steps, "schedule": schedule, "guidance_interval": list(args.guidance_interval)}  # fmt: skip


def decoder_settings(args: argparse.Namespace, pipe: "Blip3oPipeline", *, reconstructing: bool = False) -> dict[str, Any]:
    """Names as in `Blip3oPipeline.generate`; what was not said is the checkpoint's own."""
    chosen = _chosen(args, pipe.drawing, ("decoder_steps", "decoder_guidance_scale", "width", "height"))
    return chosen | {"negative": args.negative or pipe.default_negative(reconstructing=reconstructing)}


def _chosen(args: argparse.Namespace, own: "DrawingDefaults", names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(own if getattr(args, name) is None else args, name) for name in names}


def require_strength(strength: float) -> None:
    """Raises InputError unless 0 < strength <= 1."""
    if not 0 < strength <= 1:
        raise InputError(f"--strength {strength} is not in 0..1: near 0 keeps the picture, 1 keeps nothing of its embedding.")


def load_pictures(paths: Sequence[Path]) -> list["Image.Image"]:
    """Upright RGB pictures. Raises InputError that names the file."""
    from ..images import load_image

    return [load_image(path) for path in paths]


def plan_jobs(args: argparse.Namespace, names: Sequence[str]) -> list[Job]:
    """--num-images pictures of each named thing, with seed and file. Raises InputError, or OutputError if a file would be overwritten."""
    if args.num_images < 1 or args.batch_size < 1:
        raise InputError(f"--num-images {args.num_images} and --batch-size {args.batch_size} must be at least 1.")
    planned = [(index, args.seed + number) for index in range(len(names)) for number in range(args.num_images)]
    if args.output.suffix.lower() in IMAGE_SUFFIXES and not args.output.is_dir():
        if len(planned) > 1:
            raise OutputError(f"{len(planned)} pictures don't fit in the one file {args.output}. Give a folder.")
        if args.output.exists() and not args.overwrite:
            raise OutputError(f"{args.output} exists. Give another name, or --overwrite to replace it.")
        return [Job(*planned[0], args.output)]
    if args.output.suffix.lower() in (".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"):
        raise OutputError(f"{args.output}: pictures are written as .png, which keeps their recipe. Give a .png name or a folder.")
    if args.output.exists() and not args.output.is_dir():
        raise OutputError(f"{args.output} is a file, not a folder. Give a folder or a name that ends in .png.")
    numbers = free_numbers(args.output)
    return [Job(index, seed, numbered_path(args.output, next(numbers), names[index], seed)) for index, seed in planned]


def free_numbers(folder: Path) -> Iterator[int]:
    """Counts up from behind the highest numbered picture in `folder`."""
    taken = [int(match[1]) for path in (folder.glob("*.png") if folder.is_dir() else ()) if (match := re.match(r"(\d+)_", path.name))]
    return itertools.count(max(taken, default=0) + 1)


def numbered_path(folder: Path, number: int, name: str, seed: int) -> Path:
    """folder/00001_a-red-fox_7.png"""
    return folder / f"{number:05d}_{slug(name)}_{seed}.png"


def slug(prompt: str) -> str:
    """A short file name from a prompt: letters and digits only."""
    return re.sub(r"[^\w]+", "-", prompt.lower())[:SLUG_LENGTH].strip("-_") or "picture"


def draw_jobs(
    args: argparse.Namespace, pipe: "Blip3oPipeline", bars: ProgressBars, jobs: Sequence[Job], *,
    draw: Callable[[list[Job]], list["Image.Image"]], recipe: Callable[[Job], dict[str, Any]],
) -> None:  # fmt: skip
    """Draws batch after batch, saves every picture with its recipe and prints its name or a JSON line.

    Args:
        draw: some jobs -> their pictures.
        recipe: what tells this picture from others; seed and model are added.
    """
    require_writable({job.path.parent for job in jobs}, args.output)
    for start in range(0, len(jobs), args.batch_size):
        batch = list(jobs[start : start + args.batch_size])
        bars.title = f"picture {start + 1}/{len(jobs)}" if len(batch) == 1 else f"pictures {start + 1}-{start + len(batch)}/{len(jobs)}"
        began = time.monotonic()
        with memory_errors(pipe.device, f"drawing {len(batch)}", DRAWING_ADVICE):
            images = draw(batch)
        seconds = (time.monotonic() - began) / len(batch)
        for job, image in zip(batch, images, strict=True):
            full_recipe = {**recipe(job), "seed": job.seed, **pipe.describe()}
            save_png(image, job.path, full_recipe)
            report = {"file": str(job.path), **full_recipe, "seconds": round(seconds, 3)}
            bars.write(json.dumps(report, ensure_ascii=False) if args.json else str(job.path))


def save_png(image: "Image.Image", path: Path, recipe: dict[str, Any]) -> None:
    """A file with the final name is always whole; the recipe is its text entry `blip3o`. Raises OutputError."""
    from PIL.PngImagePlugin import PngInfo

    metadata = PngInfo()
    metadata.add_itxt("blip3o", json.dumps(recipe, ensure_ascii=False))
    with whole_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=metadata)
