"""Questions about a scene with their short answers, by kind."""

from dataclasses import dataclass

import numpy as np

from .facts import wanted
from .holdout import SHAPE_COLOURS, is_held_out_relation
from .language import (
    NUMBERS,
    PLACE_PHRASES,
    RELATION_PHRASES,
    amounts,
    background_name,
    left_to_right,
    plural,
    refer,
    with_article,
)
from .world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, Scene, clear_relation, closeness, pick, place_of

KINDS = ("colour", "shape", "count", "where", "yes_no", "list", "background")
_CLEARLY_NOT = 0.15  # closeness below which a relation is false to everybody


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    """A question of the kind; None if the scene gives no clear one. It names no held-out combination unless the scene shows it."""
    made = _MAKERS[kind](scene, rng)
    return None if made is None else Question(kind, *made)


def questions(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """One of every kind that the scene allows."""
    asked = (ask(kind, scene, rng) for kind in KINDS)
    return [question for question in asked if question is not None]


def _colour(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    index = int(rng.integers(len(scene.objects)))
    name = refer(scene, index, rng, without="colour")
    if name is None:
        return None
    text = pick(rng, ("what colour is the {}?", "what color is the {}?", "which colour does the {} have?", "name the colour of the {}."))
    return _capital(text.format(name)), scene.objects[index].colour


def _shape(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    index = int(rng.integers(len(scene.objects)))
    name = refer(scene, index, rng, without="shape")
    if len(scene.objects) == 1 and rng.random() < 0.5:
        name = "object"
    if name is None:
        return None
    text = pick(rng, ("which shape is the {}?", "what shape does the {} have?", "what shape is the {}?", "name the shape of the {}."))
    return _capital(text.format(name)), scene.objects[index].shape


def _count(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    what = pick(rng, ("all", "shape", "shape", "shape", "colour", "both"))
    thing = pick(rng, scene.objects)
    shape, colour = thing.shape, thing.colour
    if rng.random() < 0.25:
        shape, colour = pick(rng, SHAPES), pick(rng, tuple(COLOURS))
    if what == "both" and (shape, colour) in SHAPE_COLOURS and not _shows(scene, shape, colour):
        what = "shape"
    name = {"all": "objects", "shape": plural(shape), "colour": f"{colour} objects", "both": f"{colour} {plural(shape)}"}[what]
    count = sum(
        (what in ("all", "colour") or other.shape == shape) and (what in ("all", "shape") or other.colour == colour)
        for other in scene.objects
    )
    text = pick(rng, ("how many {} are there?", "how many {} does the picture show?", "how many {} can you see?", "count the {}."))
    return _capital(text.format(name)), NUMBERS[count]


def _where(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    index = int(rng.integers(len(scene.objects)))
    name, thing = refer(scene, index, rng), scene.objects[index]
    if name is None:
        return None
    place = place_of(thing)
    if place and rng.random() < 0.6:
        text = pick(rng, ("where is the {}?", "where in the picture is the {}?", "in which part of the picture is the {}?"))
        return _capital(text.format(name)), PLACE_PHRASES[place][0]
    for other in rng.permutation(len(scene.objects)).tolist():
        second = refer(scene, other, rng)
        relation = clear_relation(thing, scene.objects[other]) if other != index else None
        if second and relation:
            text = pick(rng, ("where is the {} relative to the {}?", "where is the {} compared to the {}?"))
            return _capital(text.format(name, second)), f"{relation} the {second}"
    return None


def _yes_no(scene: Scene, rng: np.random.Generator) -> tuple[str, str] | None:
    what = pick(rng, ("exists", "exists", "relation", "relation", "background", "colour"))
    yes = rng.random() < 0.5
    if what == "exists":
        thing = pick(rng, scene.objects)
        shape, colour = thing.shape, thing.colour
        if not yes:
            absent = [(s, c) for s in SHAPES for c in COLOURS if not _shows(scene, s, c) and (s, c) not in SHAPE_COLOURS]
            near = [pair for pair in absent if pair[0] == shape or pair[1] == colour]
            shape, colour = pick(rng, near or absent)
        text = pick(rng, ("is there {}?", "does the picture show {}?", "can you see {}?", "is there {} in the picture?"))
        return _capital(text.format(with_article(f"{colour} {shape}"))), _yes(yes)
    if what == "background":
        name = scene.background if yes else pick(rng, [name for name in BACKGROUNDS if name != scene.background])
        return f"Is the background {background_name(name, rng)}?", _yes(yes)
    if what == "colour":
        index = int(rng.integers(len(scene.objects)))
        thing, name = scene.objects[index], refer(scene, index, rng, without="colour")
        others = [colour for colour in COLOURS if colour != thing.colour and (thing.shape, colour) not in SHAPE_COLOURS]
        return None if name is None else (f"Is the {name} {thing.colour if yes else pick(rng, others)}?", _yes(yes))
    if len(scene.objects) < 2:
        return None
    first, second = rng.permutation(len(scene.objects))[:2].tolist()
    names = refer(scene, first, rng), refer(scene, second, rng)
    one, other = scene.objects[first], scene.objects[second]
    relation = clear_relation(one, other)
    if not yes:
        wrong = [name for name in RELATIONS if closeness(one, name, other) <= _CLEARLY_NOT]
        wrong = [name for name in wrong if not is_held_out_relation(one.shape, name, other.shape)]
        relation = pick(rng, wrong) if wrong else None
    if relation is None or not all(names):
        return None
    return f"Is the {names[0]} {pick(rng, RELATION_PHRASES[relation])} the {names[1]}?", _yes(yes)


def _list(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    text = pick(rng, ("List all objects.", "What is in the picture?", "Which objects are there?", "Name everything you see."))
    return text, amounts([wanted(thing, "colour") for thing in left_to_right(scene)])


def _background(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    text = pick(rng, ("What colour is the background?", "Which colour does the background have?", "What color is the background?"))
    return text, background_name(scene.background)


def _shows(scene: Scene, shape: str, colour: str) -> bool:
    return any((thing.shape, thing.colour) == (shape, colour) for thing in scene.objects)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


_MAKERS = {
    "colour": _colour, "shape": _shape, "count": _count, "where": _where, "yes_no": _yes_no, "list": _list, "background": _background,
}  # fmt: skip
