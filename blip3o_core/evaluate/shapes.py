"""The benchmark of the world of shapes: GenEval's six categories, questions, edits, reconstructions. Judged without a model."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..shapes import edits, hearts, judge, prompts, questions
from ..shapes.detector import detect
from ..shapes.facts import random_scene
from ..shapes.holdout import is_held_out
from ..shapes.world import Scene, render
from . import scores
from .items import AskItem, DrawItem, Result
from .run import OnItem, Share, run_asking, run_drawing

if TYPE_CHECKING:
    from ..pipelines.blip3o import Blip3oPipeline

TASKS = ("prompts", "understanding", "edits", "reconstruction")
HEARTS = "hearts"
"""Not among the tasks: no model knows hearts before it has learned them from a LoRA."""
EDIT_KINDS_NEVER_HELD_OUT = ("remove",)  # what is left of a scene shows no combination that the scene didn't show


def evaluate(
    pipe: "Blip3oPipeline", *, tasks: Sequence[str] = TASKS, held_out: bool = True, per_category: int = 50, seeds: int = 2,
    item_seed: int = 0, batch_size: int = 8, settings: dict[str, Any] | None = None, share: Share | None = None,
    on_item: OnItem | None = None,
) -> tuple[dict[str, Any], list[Result]]:  # fmt: skip
    """Runs the benchmark -> (report for JSON, all results); with several processes the same on each."""
    which = {"held_out": held_out, "per_category": per_category, "seed": item_seed}
    results: list[Result] = [*run_drawing(pipe, draw_items(tasks, **which), range(seeds), batch_size=batch_size, settings=settings,
                                          share=share, on_item=on_item)]  # fmt: skip
    if "understanding" in tasks:
        results += run_asking(pipe, ask_items(**which), share=share, on_item=on_item)
    report = {
        "benchmark": "shapes", "split": "held-out" if held_out else "seen", "seeds": seeds, "per_category": per_category,
        "item_seed": item_seed, "settings": settings or {}, **pipe.describe(), "scores": scores.summary(results),
        "common_faults": scores.common_faults(results),
    }  # fmt: skip
    return report, results


def draw_items(tasks: Sequence[str], *, held_out: bool, per_category: int, seed: int) -> list[DrawItem]:
    """What is drawn for those of `tasks` that draw; `per_category` items each. held_out: with combinations that training never saw."""
    items: list[DrawItem] = []
    if "prompts" in tasks:
        for category in prompts.CATEGORIES:
            items += [DrawItem(category, prompt.text, _judge_prompt(prompt))
                      for prompt in prompts.make_prompts(category, per_category, seed=seed, held_out=held_out)]  # fmt: skip
    if "edits" in tasks:
        for kind in edits.KINDS:
            rng = _generator(seed, "edits", kind)
            new = held_out and kind not in EDIT_KINDS_NEVER_HELD_OUT
            for _ in range(per_category):
                edit = edits.make_edit(kind, rng, held_out=new)
                items.append(DrawItem(kind, edit.instruction, _judge_edit(edit), render(edit.source), "edits"))
    if "reconstruction" in tasks:
        rng = _generator(seed, "reconstruction")
        for _ in range(per_category):
            scene = _scene(rng, held_out)
            items.append(DrawItem("same objects", None, _judge_reconstruction(scene), render(scene), "reconstruction"))
    if HEARTS in tasks:
        items += [DrawItem(prompt.category, prompt.text, _judge_hearts(prompt), group=HEARTS)
                  for prompt in hearts.heart_prompts(per_category, seed=seed)]  # fmt: skip
    return items


def ask_items(*, held_out: bool, per_category: int, seed: int) -> list[AskItem]:
    """`per_category` questions of every kind."""
    items = []
    for kind in questions.KINDS:
        rng = _generator(seed, "understanding", kind)
        found = 0
        while found < per_category:
            scene = _scene(rng, held_out)
            question = questions.ask(kind, scene, rng)
            if question is not None:
                items.append(AskItem(kind, question.text, _judge_answer(question), render(scene)))
                found += 1
    return items


def _scene(rng: np.random.Generator, held_out: bool) -> Scene:
    return random_scene(rng, refuse=lambda scene: is_held_out(scene) != held_out)


def _generator(seed: int, *words: str) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, *" ".join(("evaluate", *words)).encode()]))


def _judge_prompt(prompt: prompts.Prompt) -> Callable[[Image.Image], judge.Verdict]:
    return lambda picture: judge.judge_prompt(prompt.facts, detect(picture))


def _judge_hearts(prompt: prompts.Prompt) -> Callable[[Image.Image], judge.Verdict]:
    return lambda picture: judge.judge_prompt(prompt.facts, detect(picture, hearts.KNOWN))


def _judge_edit(edit: edits.Edit) -> Callable[[Image.Image], judge.Verdict]:
    return lambda picture: judge.judge_edit(edit, detect(picture))


def _judge_reconstruction(scene: Scene) -> Callable[[Image.Image], judge.Verdict]:
    return lambda picture: judge.judge_reconstruction(scene, detect(picture))


def _judge_answer(question: questions.Question) -> Callable[[str], judge.Verdict]:
    return lambda answer: judge.judge_answer(question, answer)
