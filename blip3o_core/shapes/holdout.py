"""Combinations that no training scene, caption, question or edit contains, so that drawing them shows composition.

Each is absent as a whole, its parts are frequent: every shape still comes in six colours or more, every colour in five shapes.
"""

from collections import Counter
from itertools import combinations

from .facts import Facts
from .world import OPPOSITE, RELATIONS, ROUGHLY, Scene, closeness

SHAPE_COLOURS = frozenset({
    ("ring", "red"), ("triangle", "green"), ("star", "blue"), ("cross", "yellow"), ("circle", "purple"), ("square", "orange"),
    ("triangle", "white"), ("star", "black"),
})  # fmt: skip
"""Each colour once."""

SHAPE_PAIRS = frozenset({frozenset(("circle", "cross")), frozenset(("square", "star")), frozenset(("triangle", "ring"))})
"""Two shapes in one picture; each shape once."""

SHAPE_RELATIONS = frozenset({
    ("circle", "left of", "triangle"), ("star", "left of", "circle"), ("ring", "left of", "square"), ("cross", "left of", "star"),
    ("square", "above", "triangle"), ("triangle", "above", "star"), ("ring", "above", "cross"), ("circle", "above", "ring"),
})  # fmt: skip
"""The same as their reverse: a triangle right of a circle is held out too."""

SHAPE_COUNTS = frozenset({("circle", 3), ("square", 2), ("triangle", 4), ("star", 3), ("ring", 2), ("cross", 4)})
"""Exactly so many of a shape in one picture."""

SHAPE_SIZE_BACKGROUNDS = frozenset({
    ("circle", "small", "white"), ("square", "large", "sky"), ("triangle", "small", "grey"), ("star", "large", "black"),
    ("ring", "small", "sky"), ("cross", "large", "grey"),
})  # fmt: skip

_UNDRAWN_SIGHTS = frozenset((shape, background) for shape, _, background in SHAPE_SIZE_BACKGROUNDS)
"""Nothing trains to draw these at all: where squares on sky are always small, a model learns just that, and not what "large" means."""


def is_held_out_relation(first: str, relation: str, second: str) -> bool:
    """Of two shapes."""
    return (first, relation, second) in SHAPE_RELATIONS or (second, OPPOSITE[relation], first) in SHAPE_RELATIONS


def held_out(scene: Scene) -> frozenset[str]:
    """The kinds of held-out combinations it shows: colour, pair, relation, count, sight (shape, size and background)."""
    kinds = set()
    for thing in scene.objects:
        if (thing.shape, thing.colour) in SHAPE_COLOURS:
            kinds.add("colour")
        if (thing.shape, thing.size, scene.background) in SHAPE_SIZE_BACKGROUNDS:
            kinds.add("sight")
    for first, second in combinations(scene.objects, 2):
        if frozenset((first.shape, second.shape)) in SHAPE_PAIRS:
            kinds.add("pair")
        for relation in RELATIONS:
            if closeness(first, relation, second) >= ROUGHLY and is_held_out_relation(first.shape, relation, second.shape):
                kinds.add("relation")
    if any(item in SHAPE_COUNTS for item in Counter(thing.shape for thing in scene.objects).items()):
        kinds.add("count")
    return frozenset(kinds)


def is_held_out(scene: Scene) -> bool:
    return bool(held_out(scene))


def is_undrawn_sight(shape: str, background: str) -> bool:
    """Whether no picture that a model learns to draw from a text shows the shape on the background, in any size."""
    return (shape, background) in _UNDRAWN_SIGHTS


def is_undrawn(scene: Scene) -> bool:
    """Whether no picture that a model learns to draw from a text shows this: it is held out, or would contradict what is."""
    return is_held_out(scene) or any(is_undrawn_sight(thing.shape, scene.background) for thing in scene.objects)


def held_out_facts(facts: Facts) -> frozenset[str]:
    """The kinds that the facts themselves say, whatever else is in the picture."""
    kinds = set()
    for thing in facts.objects:
        if (thing.shape, thing.colour) in SHAPE_COLOURS:
            kinds.add("colour")
        if (thing.shape, thing.size, facts.background) in SHAPE_SIZE_BACKGROUNDS:
            kinds.add("sight")
    if any(frozenset((first.shape, second.shape)) in SHAPE_PAIRS for first, second in combinations(facts.objects, 2)):
        kinds.add("pair")
    if any(is_held_out_relation(facts.objects[a].shape, name, facts.objects[b].shape) for a, name, b in facts.relations):
        kinds.add("relation")
    if any(item in SHAPE_COUNTS for item in Counter(thing.shape for thing in facts.objects).items()):
        kinds.add("count")
    return frozenset(kinds)
