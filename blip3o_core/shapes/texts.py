"""Text-to-text: a terse prompt made full, the colours in a caption, two captions compared, questions about a description."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from .edits import make_edit
from .facts import Facts, random_scene, wanted
from .holdout import is_held_out
from .language import amounts, background_name, detailed_caption, listed, noun, on_background, phrase, plural, sentence, with_article
from .questions import ask
from .world import Scene, pick

KINDS = ("rewrite", "colours", "compare", "read")
_READABLE = ("colour", "shape", "count", "list", "background")  # kinds of questions that a detailed caption always answers


@dataclass(frozen=True)
class TextTask:
    kind: str
    question: str
    answer: str


def make_text(kind: str, rng: np.random.Generator) -> TextTask:
    """About scenes that show no held-out combination."""
    return TextTask(kind, *_MAKERS[kind](rng))


def _rewrite(rng: np.random.Generator) -> tuple[str, str]:
    scene = random_scene(rng, refuse=is_held_out)
    things = [wanted(thing, "colour") for thing in scene.objects]
    terse = [noun(thing) if count == 1 else f"{count} {pick(rng, (noun, lambda thing: plural(noun(thing))))(thing)}"
             for thing, count in Counter(things).items()]  # fmt: skip
    background = scene.background if rng.random() < 0.6 else None
    if background:
        terse.append(f"{background_name(background, rng)} {pick(rng, ('bg', 'background'))}")
    request = pick(rng, ("Rewrite as a full prompt: {}", "Make a full sentence of this prompt: {}", "Expand this prompt: {}"))
    return request.format(pick(rng, (", ", "; ")).join(terse)), sentence(amounts(things) + on_background(background))


def _colours(rng: np.random.Generator) -> tuple[str, str]:
    scene = random_scene(rng, refuse=is_held_out)
    request = pick(rng, ("Which colours do the objects have? {}", "List the colours of the objects: {}", "Name all object colours. {}"))
    return request.format(_full(scene, rng)), listed(list(dict.fromkeys(thing.colour for thing in scene.objects)))


def _compare(rng: np.random.Generator) -> tuple[str, str]:
    edit = make_edit(pick(rng, ("recolour", "replace", "background")), rng)
    same = rng.random() < 0.5
    captions = [_full(edit.source, rng), _full(edit.source if same else edit.target, rng)]
    request = pick(rng, ("Do these two captions describe the same picture?", "Do both captions say the same?", "Compare the captions."))
    question = f"{request}\n1. {captions[0]}\n2. {captions[1]}"
    if same:
        return question, "Yes, both say the same."
    if edit.kind == "background":
        names = background_name(edit.source.background), background_name(edit.target.background)
        return question, f"No, the background is {names[0]} in the first and {names[1]} in the second."
    names = [with_article(noun(wanted(scene.objects[edit.subject], "colour"))) for scene in (edit.source, edit.target)]
    return question, f"No, the first has {names[0]} where the second has {names[1]}."


def _read(rng: np.random.Generator) -> tuple[str, str]:
    scene = random_scene(rng, refuse=is_held_out)
    question = None
    while question is None:
        question = ask(pick(rng, _READABLE), scene, rng)
    request = pick(rng, ("{0} {1}", "{0}\n{1}", "{1} {0}", "{1}\n{0}"))
    return request.format(detailed_caption(scene, rng), question.text), question.answer


def _full(scene: Scene, rng: np.random.Generator) -> str:
    return sentence(phrase(Facts(tuple(wanted(thing, "colour") for thing in scene.objects), background=scene.background), rng))


_MAKERS = {"rewrite": _rewrite, "colours": _colours, "compare": _compare, "read": _read}
