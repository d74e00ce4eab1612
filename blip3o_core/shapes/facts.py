"""What a text says about a picture, in a form that can be drawn from and judged by; never parsed from the text."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..errors import InputError
from .world import (
    BACKGROUNDS,
    CLEARLY,
    COLOURS,
    CORNERS,
    MAX_OBJECTS,
    ROUGHLY,
    SHAPES,
    SIZES,
    Object,
    Scene,
    backgrounds_for,
    centres,
    closeness,
    contrasts,
    fits,
    is_in_place,
    middle_of,
    pick,
    place_of,
    random_centre,
)

Refuse = Callable[[Scene], bool]
"""Whether a scene is unwanted, for what it holds or for how that lies; objects at one and the same point lie in no relation."""

_TRIES = 4000
_TRIES_PER_OBJECT = 12
_TRIES_PER_SCENE = 500
_TRIES_PER_ARRANGEMENT = 20
USUAL = 0.8
"""Share of training pictures that are as most people would draw them (`usual_scene`, `tidied`): a small model learns little from pictures
in which all that a text leaves open is random."""
_ARRANGEMENTS: dict[int, tuple[tuple[str, ...], ...]] = {
    1: (("centre",),), 2: (("left", "right"), ("top", "bottom"), ("right", "left"), ("bottom", "top")),
    3: (("top left", "top right", "bottom"),), 4: (CORNERS,),
}  # fmt: skip
"""Number of objects -> places of the objects in their order, the usual ones first."""
_RELATED = {"left of": ("left", "right"), "right of": ("right", "left"), "above": ("top", "bottom"), "below": ("bottom", "top")}
"""Relation -> places of its first and second object."""


@dataclass(frozen=True)
class Wanted:
    """One object; what is None was not said."""

    shape: str
    colour: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Facts:
    """All objects of the picture, no more and no fewer."""

    objects: tuple[Wanted, ...]
    relations: tuple[tuple[int, str, int], ...] = ()  # object, relation of RELATIONS, other object
    background: str | None = None


def wanted(thing: Object, *said: str, place: str | None = None) -> Wanted:
    """The shape and those of "colour", "size" that are said."""
    return Wanted(thing.shape, thing.colour if "colour" in said else None, thing.size if "size" in said else None, place)


def realise(facts: Facts, rng: np.random.Generator, refuse: Refuse = lambda scene: False) -> Scene:
    """A random scene of which all the facts are clearly true. Raises InputError if there is none, or `refuse` takes none."""
    for _ in range(_TRIES):
        scene = _attempt(facts, rng, refuse)
        if scene is not None:
            return scene
    raise InputError(f"{facts}: no picture can show that. Take colours that differ from the background, and fewer or smaller objects.")


def _attempt(facts: Facts, rng: np.random.Generator, refuse: Refuse) -> Scene | None:
    """Asks `refuse` first with all objects in the middle: most scenes are refused for what they hold, and placing takes long."""
    contents = _contents(facts, rng)
    if contents is None or refuse(contents):
        return None
    objects: list[Object] = []
    for thing, new in zip(facts.objects, contents.objects, strict=True):
        for _ in range(_TRIES_PER_OBJECT):
            new = Object(new.shape, new.colour, new.size, random_centre(rng, new.size, thing.place))
            if fits(new, objects):
                break
        else:
            return None
        objects.append(new)
    true = all(closeness(objects[first], relation, objects[second]) >= CLEARLY for first, relation, second in facts.relations)
    scene = Scene(tuple(objects), contents.background)
    return None if not true or refuse(scene) else scene


def _contents(facts: Facts, rng: np.random.Generator) -> Scene | None:
    """Everything but where it lies: all objects are in the middle. None if no background lets the colours be told apart."""
    said = [thing.colour for thing in facts.objects if thing.colour]
    backgrounds = [name for name in backgrounds_for(said) if facts.background in (None, name)]
    if not backgrounds:
        return None
    background = pick(rng, backgrounds)
    colours = [name for name in COLOURS if contrasts(name, background)]
    return Scene(tuple(Object(thing.shape, thing.colour or pick(rng, colours), thing.size or pick(rng, tuple(SIZES)), (0.5, 0.5))
                       for thing in facts.objects), background)  # fmt: skip


def random_scene(rng: np.random.Generator, *, objects: int | None = None, refuse: Refuse = lambda scene: False) -> Scene:
    """Any scene that is not refused; `objects` is their number, drawn from 1 to 4 if it is None.

    Number, background and one of the shapes are drawn before anything can be refused, so that all of them stay equally frequent.
    """
    count = objects or int(rng.integers(1, MAX_OBJECTS + 1))
    while True:
        background, shape, place = pick(rng, tuple(BACKGROUNDS)), pick(rng, SHAPES), int(rng.integers(count))
        for _ in range(_TRIES_PER_SCENE):
            shapes = [shape if index == place else pick(rng, SHAPES) for index in range(count)]
            scene = _attempt(Facts(tuple(map(Wanted, shapes)), background=background), rng, refuse)
            if scene is not None:
                return scene


def usual_scene(facts: Facts, rng: np.random.Generator, refuse: Refuse = lambda scene: False) -> Scene | None:
    """What most people would draw: large objects, one in the centre, two beside each other, three or four around the centre.

    Objects of which the same is said have the same colour; else colours and background are as random as in `realise`. None if it can't
    be so, or would be refused.
    """
    if any(thing.place for thing in facts.objects) or len(facts.relations) > 1:
        return None
    arrangements = _ARRANGEMENTS[len(facts.objects)]
    if facts.relations:
        first, relation, _ = facts.relations[0]
        places = _RELATED[relation]
        arrangements = (places if first == 0 else places[::-1],)
    large = replace(facts, objects=tuple(replace(thing, size=thing.size or "large") for thing in facts.objects))
    for places in arrangements:
        for _ in range(_TRIES_PER_ARRANGEMENT):
            scene = _contents(large, rng)
            if scene is None:
                return None
            colours = dict(zip(large.objects, (thing.colour for thing in scene.objects), strict=True))
            scene = replace(scene, objects=tuple(
                replace(thing, colour=colours[asked], centre=middle_of(place))
                for asked, thing, place in zip(large.objects, scene.objects, places, strict=True)
            ))  # fmt: skip
            if not refuse(scene):
                return scene
    return None


def tidied(scene: Scene) -> Scene:
    """Every object stays in its place, but as near to the middle of it as the others allow; all of that follows from sizes and places."""
    things = [(thing, place_of(thing), index) for index, thing in enumerate(scene.objects)]
    things.sort(key=lambda item: (item[0].size, item[1]))
    best: tuple[float, list[Object]] = (math.inf, [])

    def search(cost: float, placed: list[Object]) -> None:
        nonlocal best
        if len(placed) == len(things):
            best = cost, placed
            return
        thing, place, _ = things[len(placed)]
        far = {centre: round(math.dist(centre, middle_of(place)), 6) for centre in centres(thing.size, place)}
        for centre in sorted(far, key=lambda centre: (far[centre], centre)):
            if cost + far[centre] >= best[0]:
                return
            new = replace(thing, centre=centre)
            if fits(new, placed):
                search(cost + far[centre], [*placed, new])

    search(0.0, [])
    moved = sorted(zip(things, best[1], strict=True), key=lambda item: item[0][2])
    return replace(scene, objects=tuple(new for _, new in moved))


def fault(facts: Facts, scene: Scene) -> str:
    """Why the scene is not what the facts say, or an empty string. Positions may be off a little (world.is_in_place, ROUGHLY)."""
    if facts.background and facts.background != scene.background:
        return f"the background is {scene.background}, not {facts.background}"
    if len(scene.objects) != len(facts.objects):
        return f"{len(scene.objects)} objects, not {len(facts.objects)}"
    faults = (_faults_of(facts, order) for order in itertools.permutations(scene.objects))
    return min(faults, key=lambda found: (found.count(";") + bool(found), found), default="")


def _faults_of(facts: Facts, objects: tuple[Object, ...]) -> str:
    found = []
    for thing, actual in zip(facts.objects, objects, strict=True):
        for name in ("shape", "colour", "size"):
            asked, drawn = getattr(thing, name), getattr(actual, name)
            if asked not in (None, drawn):
                found.append(f"the {thing.shape} has the {name} {drawn}, not {asked}")
        if thing.place and not is_in_place(actual, thing.place):
            found.append(f"the {thing.shape} is not in the place {thing.place}")
    for first, relation, second in facts.relations:
        if closeness(objects[first], relation, objects[second]) < ROUGHLY:
            found.append(f"the {facts.objects[first].shape} is not {relation} the {facts.objects[second].shape}")
    return "; ".join(found)

