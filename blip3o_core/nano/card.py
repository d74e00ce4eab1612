"""The model card: what nano is, what it was trained on, how long, and what it can do, from the logs of its stages and its scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import write_text
from ..train.config import load_config
from ..train.log import read_log

INTRODUCTION = """# Nano

BLIP3-o's architecture at toy size (13 million parameters, 26 MB), trained on a drawn world of coloured shapes. It draws, edits,
reconstructs and answers questions about pictures of 128 x 128 pixels with one to four circles, squares, triangles, stars, rings and
crosses in eight colours on four backgrounds. It knows nothing else, and its English is that of this world. It is made for trying
things and for tests; it is no small version of the published models.

All pictures and texts come from the generator `blip3o_core/shapes`, seed 0, without the combinations in `holdout.py`. Nothing
else was used; weights and data are under the licence of this repository (Apache-2.0).

`blip3o train-nano --output DIR` trains it again; the recipes are in `blip3o_core/recipes/nano`.
"""


@dataclass(frozen=True)
class Stage:
    name: str
    parts: tuple[str, ...]
    tasks: tuple[str, ...]
    steps: int
    samples: int
    seconds: float
    first: Mapping[str, float]  # validation losses by task, before and after
    last: Mapping[str, float]


def stage_record(folder: Path) -> Stage:
    """What the log of a finished run says."""
    config = load_config(folder / "config.toml")
    lines = read_log(folder)
    validations = [line["losses"] for line in lines if line["kind"] == "validation"] or [{}]
    trained = [line for line in lines if line["kind"] == "train"]
    steps = max((line["step"] for line in lines), default=0)
    return Stage(
        folder.name, config.train.parts, tuple(dict.fromkeys(data.task for data in config.data)), steps,
        steps * config.train.batch_size * config.train.gradient_accumulation, trained[-1]["seconds"] if trained else 0.0,
        validations[0], validations[-1],
    )  # fmt: skip


def write_card(file: Path, stages: Sequence[Stage], *, machine: str, scores: Mapping[str, Any] | None = None) -> None:
    """scores: what `blip3o evaluate shapes --json` says by split, if it was measured. Raises OutputError."""
    lines = [INTRODUCTION, "## Training", "", f"On {machine}; bfloat16 autocast, single process.", "",
             "| stage | trains | on | steps | samples | minutes | validation loss |", "|---|---|---|---|---|---|---|"]  # fmt: skip
    for stage in stages:
        losses = "; ".join(f"{task} {stage.first[task]:.3g} to {stage.last[task]:.3g}" for task in stage.last)
        lines.append(f"| {stage.name} | {', '.join(stage.parts)} | {', '.join(stage.tasks)} | {stage.steps:,} | {stage.samples:,} | "
                     f"{stage.seconds / 60:.0f} | {losses} |")
    for split, report in (scores or {}).items():
        seeds = "one seed" if report["seeds"] == 1 else f"{report['seeds']} seeds"
        about = f"`blip3o evaluate shapes --split {split}`, {report['per_category']} items per category, {seeds}."
        lines += ["", f"## Scores, {split} combinations", "", about, "", "| | score |", "|---|---|"]
        for group, values in report["scores"].items():
            if not isinstance(values, dict):
                lines.append(f"| difference between seeds | {values:.3f} |")
                continue
            lines.append(f"| **{group}** | **{values['score']:.3f}** |")
            if len(values["categories"]) > 1:
                lines += [f"| {name.replace('_', ' ')} | {row['score']:.3f} |" for name, row in values["categories"].items()]
    write_text(file, "\n".join(lines) + "\n")
