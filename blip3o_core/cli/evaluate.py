"""Measure how well a model draws, edits and understands."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, OutputError
from ..files import require_writable, whole_file, write_text
from .drawing import SOLVER_NAMES
from .options import add_model_arguments, add_vision_encoder_argument, memory_errors, open_pipeline
from .progress import ProgressBars

if TYPE_CHECKING:
    from PIL import Image

    from ..evaluate.items import Result
    from ..pipelines.blip3o import Blip3oPipeline

EXAMPLES = """examples:
  blip3o evaluate shapes                                      the model in this package, held-out combinations
  blip3o evaluate shapes --split seen --only prompts --per-category 20 --output seen/
  blip3o evaluate geneval --prompts evaluation_metadata.jsonl --model BLIP3o-Model-4B --output geneval/
  accelerate launch --num_processes 4 -m blip3o_core.cli.main evaluate dpg-bench --prompts prompts/ --output dpg/

shapes draws a world of coloured shapes, which a detector judges: GenEval's six categories, edits, reconstructions, and answers to
questions. It means something for models that know this world, such as nano. geneval, dpg-bench and wise only draw: their pictures
are written in the layout that the public scorers read, prompts that have theirs are skipped.
"""
BENCHMARKS = ("shapes", "geneval", "dpg-bench", "wise")
# as in evaluate/shapes.py, which --help must not import
TASKS, HEARTS = ("prompts", "understanding", "edits", "reconstruction"), "hearts"
SHEET_PICTURES = 64  # per group
ADVICE = "Lower --batch-size."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", choices=BENCHMARKS, help="see below")
    add_model_arguments(parser)
    add_vision_encoder_argument(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for the pictures; shapes: for scores.json, all results and "
                        "sheets of pictures, none of which it writes without")  # fmt: skip
    parser.add_argument("--seeds", type=int, metavar="N", help="pictures per prompt, with the seeds 0, 1, ... (default: shapes 2, others "
                        "as the benchmark is published)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="pictures drawn at once (default: %(default)s)")
    shapes = parser.add_argument_group("shapes")
    shapes.add_argument("--split", choices=("held-out", "seen"), default="held-out", help="held-out: combinations of shapes, colours, "
                        "relations and counts that nano was never trained on (default: %(default)s)")  # fmt: skip
    shapes.add_argument("--only", choices=(*TASKS, HEARTS), action="append", help="one part of the benchmark; may be "
                        "given several times. hearts: a shape that nano has to learn from a LoRA first")  # fmt: skip
    shapes.add_argument("--per-category", type=int, default=50, metavar="N", help="items of each category (default: %(default)s)")
    shapes.add_argument("--item-seed", type=int, default=0, metavar="S", help="which prompts, questions and edits (default: %(default)s)")
    shapes.add_argument("--json", action="store_true", help="print the scores as JSON in place of the table")
    others = parser.add_argument_group("geneval, dpg-bench, wise")
    others.add_argument("--prompts", type=Path, metavar="PATH", help="the benchmark's prompt file; dpg-bench: its folder of .txt")
    drawing = parser.add_argument_group("drawing (default: the model's own settings)")
    for name, kind in (("steps", int), ("guidance-scale", float), ("decoder-steps", int), ("decoder-guidance-scale", float),
                       ("width", int), ("height", int)):  # fmt: skip
        drawing.add_argument(f"--{name}", type=kind, metavar="N", help="as of generate")
    drawing.add_argument("--solver", choices=SOLVER_NAMES, help="as of generate")


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError; wrong arguments are found before weights are read."""
    if args.batch_size < 1 or args.per_category < 1 or (args.seeds is not None and args.seeds < 1):
        raise InputError("--batch-size, --per-category and --seeds must be at least 1.")
    if args.output is not None and args.output.exists() and not args.output.is_dir():
        raise OutputError(f"{args.output} is a file. Give a folder.")
    names = ("steps", "guidance_scale", "decoder_steps", "decoder_guidance_scale", "width", "height", "solver")
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.benchmark == "shapes":
        evaluate_shapes(args, settings)
    else:
        draw_prompt_file(args, settings)


def evaluate_shapes(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    if args.prompts is not None:
        raise InputError("--prompts is for geneval, dpg-bench and wise; shapes makes its own.")
    from ..evaluate import scores
    from ..evaluate.run import Share
    from ..evaluate.shapes import evaluate

    share, tasks, seeds = Share(), args.only or TASKS, args.seeds or 2
    with ProgressBars() as bars:
        pipe = open_pipeline(args, bars, args.vision_encoder)
        pipe.check_generate([], seeds=list(range(seeds)), **settings)
        if "reconstruction" in tasks:
            pipe.require_vision_encoder()
        if args.output is not None:
            require_writable([args.output], args.output)
        with memory_errors(pipe.device, "evaluating", ADVICE):
            report, results = evaluate(pipe, tasks=tasks, held_out=args.split == "held-out", per_category=args.per_category, seeds=seeds,
                                       item_seed=args.item_seed, batch_size=args.batch_size, settings=settings, share=share,
                                       on_item=bars.on_item)  # fmt: skip
        if not share.is_main:
            return
        if args.output is not None:
            write_results(args.output, report, results)
        bars.write(json.dumps(report, ensure_ascii=False) if args.json else scores.table(report["scores"]))


def write_results(folder: Path, report: dict[str, Any], results: "list[Result]") -> None:
    """scores.json, results.jsonl and a sheet per group. Raises OutputError."""
    from ..evaluate import scores
    from ..evaluate.items import Drawn

    write_text(folder / "scores.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    lines = []
    for result in results:
        said = {"text": result.item.text, "seed": result.seed} if isinstance(result, Drawn) else {
            "text": result.item.question, "answer": result.answer}  # fmt: skip
        lines.append(json.dumps({"group": result.item.group, "category": result.item.category, **said, "right": result.verdict.right,
                                 "reason": result.verdict.reason}, ensure_ascii=False))  # fmt: skip
    write_text(folder / "results.jsonl", "\n".join(lines) + "\n")
    drawn = [result for result in results if isinstance(result, Drawn)]
    for group in dict.fromkeys(result.item.group for result in drawn):
        own = [result for result in drawn if result.item.group == group]
        some = own[:: max(1, len(own) // SHEET_PICTURES)][:SHEET_PICTURES]
        _save(scores.sheet(some, title=f"{report['model']}: {group}, {report['split']}", columns=8), folder / f"{group}.png")


def draw_prompt_file(args: argparse.Namespace, settings: dict[str, Any]) -> None:
    from ..evaluate.prompt_files import FORMATS
    from ..evaluate.run import Share

    if args.prompts is None or args.output is None:
        raise InputError(f"{args.benchmark} needs --prompts (its prompt file) and --output (a folder for the pictures).")
    if args.only or args.json:
        raise InputError("--only and --json are for shapes.")
    form, share = FORMATS[args.benchmark], Share()
    prompts = form.read(args.prompts)
    count = args.seeds or form.images_per_prompt
    todo = [prompt for prompt in share.of(prompts) if not form.is_written(args.output, prompt, count)]
    with ProgressBars() as bars:
        pipe = open_pipeline(args, bars)
        pipe.check_generate([prompt.text for prompt in prompts], seeds=list(range(count)), **settings)
        require_writable([args.output], args.output)
        for done, prompt in enumerate(todo, start=1):
            with memory_errors(pipe.device, "drawing", ADVICE):
                form.write(args.output, prompt, _pictures(pipe, prompt.text, count, args.batch_size, settings))
            bars.on_item("prompts", done, len(todo))
        if share.is_main:
            bars.write(f"{args.output}: {len(prompts)} prompts, {len(prompts) - len(todo) if share.world == 1 else 'some'} were there")


def _pictures(pipe: "Blip3oPipeline", text: str, count: int, batch_size: int, settings: dict[str, Any]) -> "list[Image.Image]":
    pictures: list[Image.Image] = []
    for start in range(0, count, batch_size):
        seeds = list(range(start, min(start + batch_size, count)))
        pictures += pipe.generate([text] * len(seeds), seeds=seeds, **settings)
    return pictures


def _save(picture: "Image.Image", path: Path) -> None:
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")
