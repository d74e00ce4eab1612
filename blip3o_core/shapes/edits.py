"""Edits: a scene, an instruction that changes one thing, and the scene afterwards."""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .facts import Wanted, random_scene
from .holdout import is_held_out, is_undrawn
from .language import PLACE_PHRASES, RELATION_PHRASES, amount, background_name, refer, styled, with_article
from .world import (
    BACKGROUNDS,
    CLEARLY,
    COLOURS,
    MAX_OBJECTS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Point,
    Scene,
    centres,
    closeness,
    fits,
    is_in_place,
    is_possible,
    middle_of,
    pick,
)

KINDS = ("recolour", "replace", "add", "remove", "move", "background")
TRAINING_SHARES = {"recolour": 0.25, "replace": 0.25, "add": 0.15, "remove": 0.1, "move": 0.15, "background": 0.1}
"""The more an edit leaves to be told from the instruction alone, the longer it takes to learn."""
_FAR = 0.25  # how much an object has to be moved at least
_BESIDE = 0.4375  # between the centres of two objects beside each other: room for large ones


@dataclass(frozen=True)
class Edit:
    """Everything in `target` must be drawn as it is, except of object `subject` what the instruction left open."""

    kind: str
    source: Scene
    instruction: str
    target: Scene
    subject: int | None = None  # place in target.objects of what was changed or added
    said: Wanted | None = None  # of the subject; what is None may be anything
    stays: bool = True  # the subject is where it is in target, else only where `said.place` and `relation` tell
    relation: tuple[str, int] | None = None  # of the subject to another object of target


def make_edit(kind: str, rng: np.random.Generator, *, held_out: bool = False) -> Edit:
    """A random edit; its source shows no held-out combination, its target shows one if `held_out`, else none.

    Raises: InputError for a held-out removal: what is left of a scene without such a combination hardly ever shows one.
    """
    if held_out and kind == "remove":
        raise InputError('edits of the kind "remove" can\'t be held out. Evaluate them with held_out=False.')
    fewest, most = {"add": (1, MAX_OBJECTS - 1), "remove": (2, MAX_OBJECTS)}.get(kind, (1, MAX_OBJECTS))
    while True:
        source = random_scene(rng, objects=int(rng.integers(fewest, most + 1)), refuse=is_held_out)
        edit = _MAKERS[kind](source, rng)
        if edit is not None and is_possible(edit.target) and (is_held_out(edit.target) if held_out else not is_undrawn(edit.target)):
            return edit


def _with(scene: Scene, index: int, **changes: object) -> Scene:
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **changes)
    return Scene(tuple(objects), scene.background)


def _any_object(scene: Scene, rng: np.random.Generator) -> tuple[int, str | None]:
    index = int(rng.integers(len(scene.objects)))
    return index, refer(scene, index, rng)


def _recolour(scene: Scene, rng: np.random.Generator) -> Edit | None:
    index, name = _any_object(scene, rng)
    thing = scene.objects[index]
    colour = pick(rng, [colour for colour in COLOURS if colour != thing.colour])
    if name is None:
        return None
    template = pick(rng, ("make the {} {}", "change the colour of the {} to {}", "turn the {} {}", "paint the {} {}",
                          "change the color of the {} to {}"))  # fmt: skip
    text = styled("{}", template.format(name, colour), rng)
    return Edit("recolour", scene, text, _with(scene, index, colour=colour), index, Wanted(thing.shape, colour, thing.size))


def _replace(scene: Scene, rng: np.random.Generator) -> Edit | None:
    """With a colour, "replace"; without one, "turn into", which keeps the colour."""
    index, name = _any_object(scene, rng)
    thing = scene.objects[index]
    shape = pick(rng, [shape for shape in SHAPES if shape != thing.shape])
    colour = pick(rng, tuple(COLOURS)) if rng.random() < 0.5 else thing.colour
    if name is None:
        return None
    if colour == thing.colour:
        text = f"turn the {name} into {with_article(shape)}"
    else:
        text = pick(rng, ("replace the {} with {}", "put {1} in place of the {0}", "swap the {} for {}")).format(
            name, with_article(f"{colour} {shape}")
        )
    target = _with(scene, index, shape=shape, colour=colour)
    return Edit("replace", scene, styled("{}", text, rng), target, index, Wanted(shape, colour, thing.size))


def _add(scene: Scene, rng: np.random.Generator) -> Edit | None:
    said = Wanted(pick(rng, SHAPES), pick(rng, tuple(COLOURS)), pick(rng, tuple(SIZES)) if rng.random() < 0.5 else None)
    verb = pick(rng, ("add", "put"))
    size = said.size or pick(rng, tuple(SIZES))
    place, relation, where = _destination(scene, None, rng) if verb == "put" or rng.random() < 0.7 else (None, None, "")
    new = _placed(Object(said.shape, said.colour, size, (0.5, 0.5)), scene.objects, scene, place, relation)
    if new is None:
        return None
    said = dataclasses.replace(said, place=place)
    text = styled("{}", f"{verb} {amount(1, dataclasses.replace(said, place=None))}{where}", rng)
    return Edit("add", scene, text, Scene((*scene.objects, new), scene.background), len(scene.objects), said, False, relation)


def _placed(
    thing: Object, others: tuple[Object, ...], scene: Scene, place: str | None, relation: tuple[str, int] | None, *,
    away_from: Point | None = None,
) -> Object | None:  # fmt: skip
    """The thing where one would expect it: in the middle of the place, or beside the other object, or else where most room is.

    None if it fits nowhere. others: what it must not touch; relation: to an object of the scene; away_from: at least _FAR from there.
    """
    name, other = (relation[0], scene.objects[relation[1]]) if relation else (None, None)

    def misfit(new: Object) -> float:
        if other:
            return 1 - closeness(new, name, other) + abs(math.dist(new.centre, other.centre) - _BESIDE)
        if place:
            return math.dist(new.centre, middle_of(place))
        return -min(math.dist(new.centre, one.centre) for one in others)

    possible = [dataclasses.replace(thing, centre=centre) for centre in centres(thing.size, place)]
    possible = [new for new in possible if fits(new, others)
                and (other is None or closeness(new, name, other) >= CLEARLY)
                and (away_from is None or math.dist(new.centre, away_from) >= _FAR)]  # fmt: skip
    return min(possible, key=lambda new: (round(misfit(new), 6), new.centre), default=None)


def _destination(scene: Scene, moved: int | None, rng: np.random.Generator) -> tuple[str | None, tuple[str, int] | None, str]:
    """A place, or a relation to an object other than the moved one, and its words with a space before them."""
    other = int(rng.integers(len(scene.objects)))
    name = refer(scene, other, rng)
    if other != moved and name is not None and rng.random() < 0.5:
        relation = pick(rng, tuple(RELATIONS))
        return None, (relation, other), f" {pick(rng, RELATION_PHRASES[relation])} the {name}"
    place = pick(rng, tuple(PLACES))
    return place, None, f" {pick(rng, PLACE_PHRASES[place])}"


def _remove(scene: Scene, rng: np.random.Generator) -> Edit | None:
    index, name = _any_object(scene, rng)
    if name is None:
        return None
    text = styled("{}", pick(rng, ("remove the {}", "delete the {}", "take the {} away", "erase the {}")).format(name), rng)
    return Edit("remove", scene, text, Scene(scene.objects[:index] + scene.objects[index + 1 :], scene.background))


def _move(scene: Scene, rng: np.random.Generator) -> Edit | None:
    index, name = _any_object(scene, rng)
    if name is None:
        return None
    thing = scene.objects[index]
    others = scene.objects[:index] + scene.objects[index + 1 :]
    place, relation, where = _destination(scene, index, rng)
    if place and is_in_place(thing, place):
        return None
    if relation and closeness(thing, relation[0], scene.objects[relation[1]]) > 0.3:
        return None
    for preposition in ("in the ", "at the ", "on the "):
        where = where.replace(f" {preposition}", " to the ", 1) if where.startswith(f" {preposition}") else where
    new = _placed(thing, others, scene, place, relation, away_from=thing.centre)
    if new is None:
        return None
    text = styled("{}", f"{'move' if where.startswith(' to ') else pick(rng, ('move', 'put'))} the {name}{where}", rng)
    said = Wanted(thing.shape, thing.colour, thing.size, place)
    return Edit("move", scene, text, _with(scene, index, centre=new.centre), index, said, False, relation)


def _background(scene: Scene, rng: np.random.Generator) -> Edit | None:
    background = pick(rng, [name for name in BACKGROUNDS if name != scene.background])
    template = pick(rng, ("change the background to {}", "make the background {}", "turn the background {}", "use a {} background"))
    text = styled("{}", template.format(background_name(background, rng)), rng)
    return Edit("background", scene, text, Scene(scene.objects, background))


_MAKERS = {"recolour": _recolour, "replace": _replace, "add": _add, "remove": _remove, "move": _move, "background": _background}
