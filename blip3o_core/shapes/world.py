"""Scenes of one to four objects on a plain background, and their pictures.

Lengths are fractions of the picture's side, from its upper left corner; x points right, y down.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image, ImageDraw

T = TypeVar("T")
RGB = tuple[int, int, int]
Point = tuple[float, float]
Outline = list[tuple[list[Point], bool]]
"""Polygons within -1..1, and whether each is a hole in those before."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
HEART = "heart"
"""A shape that can be drawn and detected, but is in none of the data: what a LoRA can teach (hearts.py)."""
COLOURS: dict[str, RGB] = {
    "red": (220, 40, 40), "green": (40, 170, 70), "blue": (40, 80, 220), "yellow": (240, 200, 40), "purple": (150, 60, 190),
    "orange": (245, 130, 30), "white": (245, 245, 245), "black": (25, 25, 25),
}  # fmt: skip
BACKGROUNDS: dict[str, RGB] = {"white": COLOURS["white"], "black": COLOURS["black"], "grey": (128, 128, 128), "sky": (150, 200, 240)}
SIZES = {"small": 0.125, "large": 0.1875}
"""Half the width of an object: 32 or 48 pixels of 128."""

MAX_OBJECTS = 4
MARGIN = 0.03  # between an object and the border
GAP = 0.055  # between two objects: 7 pixels of 128, which a blur of a few pixels does not close
MIN_CONTRAST = 110  # Euclidean in RGB; leaves out white on white and sky, black on black, purple on grey
RING_HOLE = 0.52  # inner radius of a ring
SUPERSAMPLING = 4
_MIDDLE = 0.4  # radius of what label_map calls the middle of an object, as a share of its own

LATTICE = 16
"""Centres are whole sixteenths of the side. An object then cuts its cells of 16 pixels, of which a CLIP embedding has one token each, in
one of four ways, and a small model sees each of them often."""
BANDS = {"low": (3, 4, 5), "middle": (7, 8, 9), "high": (11, 12, 13)}
"""Where centres may lie along an axis, in steps of the lattice: every object is clearly in a place that texts can name."""
_TOLERANCE = 0.09  # a drawn object that lies a little beside its band is still accepted
PLACES: dict[str, tuple[str, str]] = {
    "top left": ("low", "low"), "top": ("middle", "low"), "top right": ("high", "low"),
    "left": ("low", "middle"), "centre": ("middle", "middle"), "right": ("high", "middle"),
    "bottom left": ("low", "high"), "bottom": ("middle", "high"), "bottom right": ("high", "high"),
}  # fmt: skip
CORNERS = ("top left", "top right", "bottom left", "bottom right")

RELATIONS: dict[str, Point] = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Direction from the second object to the first."""
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
CLEARLY = 0.85  # cosine between the direction of a relation and where the object lies: within 32 degrees
ROUGHLY = 0.5  # within 60 degrees, so that a diagonal is both, as in GenEval


@dataclass(frozen=True)
class Object:
    """One shape; its centre is the middle of the box around it."""

    shape: str
    colour: str
    size: str
    centre: Point

    @property
    def radius(self) -> float:
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    objects: tuple[Object, ...]
    background: str


def contrasts(colour: str, background: str) -> bool:
    return math.dist(COLOURS[colour], BACKGROUNDS[background]) >= MIN_CONTRAST


def backgrounds_for(colours: Sequence[str]) -> list[str]:
    """Those on which all the colours can be told apart; there may be none."""
    return [name for name in BACKGROUNDS if all(contrasts(colour, name) for colour in colours)]


def fits(new: Object, others: Sequence[Object]) -> bool:
    """Whether it lies inside the picture and keeps its distance from the others: their boxes never touch."""
    reach = new.radius + MARGIN - 1e-9
    if not all(reach <= value <= 1 - reach for value in new.centre):
        return False
    return all(
        max(abs(new.centre[0] - other.centre[0]), abs(new.centre[1] - other.centre[1])) >= new.radius + other.radius + GAP
        for other in others
    )


def is_possible(scene: Scene) -> bool:
    """Whether the generator could have made it: contrast, distances, one to four objects."""
    return (
        0 < len(scene.objects) <= MAX_OBJECTS
        and all(contrasts(thing.colour, scene.background) for thing in scene.objects)
        and all(fits(thing, scene.objects[:index]) for index, thing in enumerate(scene.objects))
    )


def place_of(thing: Object) -> str | None:
    """The place of PLACES that it clearly is in."""
    return next((name for name in PLACES if _within(thing, name, 0)), None)


def is_in_place(thing: Object, place: str) -> bool:
    """Whether it may be said to be there."""
    return _within(thing, place, _TOLERANCE)


def _within(thing: Object, place: str, tolerance: float) -> bool:
    bands = [BANDS[band] for band in PLACES[place]]
    return all(band[0] / LATTICE - tolerance <= value <= band[-1] / LATTICE + tolerance
               for value, band in zip(thing.centre, bands, strict=True))


def closeness(first: Object, relation: str, second: Object) -> float:
    """Cosine in -1..1 between the relation's direction and where the first lies seen from the second; compare with CLEARLY, ROUGHLY."""
    dx, dy = first.centre[0] - second.centre[0], first.centre[1] - second.centre[1]
    x, y = RELATIONS[relation]
    return (dx * x + dy * y) / (math.hypot(dx, dy) or 1)


def clear_relation(first: Object, second: Object) -> str | None:
    return next((name for name in RELATIONS if closeness(first, name, second) >= CLEARLY), None)


def pick(rng: np.random.Generator, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


def centres(size: str, place: str | None = None) -> list[Point]:
    """Of all objects of a size inside the margins, or in a place."""
    reach = SIZES[size] + MARGIN
    bands = [tuple(itertools.chain(*BANDS.values()))] * 2 if place is None else [BANDS[band] for band in PLACES[place]]
    return list(itertools.product(*([step / LATTICE for step in band if reach <= step / LATTICE <= 1 - reach] for band in bands)))


def random_centre(rng: np.random.Generator, size: str, place: str | None = None) -> Point:
    """Anywhere inside the margins, or in a place."""
    return pick(rng, centres(size, place))


def middle_of(place: str) -> Point:
    """Of one of PLACES."""
    x, y = (BANDS[band][1] / LATTICE for band in PLACES[place])
    return x, y


def render(scene: Scene, side: int = 128, *, outline_of: Callable[[str], Outline] | None = None) -> Image.Image:
    """The picture, RGB, side x side, antialiased. The same scene always gives the same pixels.

    outline_of: shape -> what to draw; None draws the shape (`outline`).
    """
    picture = _paint(scene, side * SUPERSAMPLING, BACKGROUNDS[scene.background], lambda thing: COLOURS[thing.colour], outline_of or outline)
    return picture.reduce(SUPERSAMPLING)


def label_map(scene: Scene, side: int = 128) -> Image.Image:
    """What each pixel shows, as RGB: number of the shape, of the colour, of the size. Where there is no object, 0 but for the colour.

    In the middle of an object the size has numbers of its own, so that objects can be counted.
    """
    names = (SHAPES, tuple(COLOURS), tuple(SIZES))

    def labels(thing: Object) -> RGB:
        red, green, blue = (1 + own.index(name) for own, name in zip(names, (thing.shape, thing.colour, thing.size), strict=True))
        return red, green, blue

    ground = (0, 1 + len(COLOURS) + list(BACKGROUNDS).index(scene.background), 0)
    picture = _paint(scene, side, ground, labels, outline)
    draw = ImageDraw.Draw(picture)
    for thing in scene.objects:
        red, green, blue = labels(thing)
        reach = _MIDDLE * thing.radius
        box = [(value + sign * reach) * side for sign in (-1, 1) for value in thing.centre]
        draw.ellipse(box, fill=(red, green, blue + len(SIZES)))
    return picture


def _paint(scene: Scene, side: int, ground: RGB, fill: Callable[[Object], RGB], outline_of: Callable[[str], Outline]) -> Image.Image:
    picture = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(picture)
    for thing in scene.objects:
        for polygon, is_hole in outline_of(thing.shape):
            points = [tuple((centre + value * thing.radius) * side - 0.5 for centre, value in zip(thing.centre, point, strict=True))
                      for point in polygon]  # fmt: skip
            draw.polygon(points, fill=ground if is_hole else fill(thing))
    return picture


def outline(shape: str) -> Outline:
    """The box around it is centred and 2 wide (square: 1.8).

    shape: of SHAPES, or HEART.
    """
    if shape == "circle":
        return [(_round(1), False)]
    if shape == "ring":
        return [(_round(1), False), (_round(RING_HOLE), True)]
    if shape == "square":
        return [([(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)], False)]
    if shape == "triangle":
        half = math.sqrt(3) / 2
        return [([(0, -half), (1, half), (-1, half)], False)]
    if shape == "cross":
        arm = 0.36
        right = [(arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, 1)]
        return [([*right, *((-x, -y) for x, y in right)], False)]
    if shape == HEART:
        turns = [step * math.pi / 60 for step in range(120)]
        points = [(math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16) for t in turns]
        middle = (min(y for _, y in points) + max(y for _, y in points)) / 2
        return [([(x, y - middle) for x, y in points], False)]
    assert shape == "star", shape
    angles = [math.pi * step / 5 for step in range(10)]
    points = [(radius * math.sin(angle), -radius * math.cos(angle)) for angle, radius in zip(angles, (1, 0.42) * 5, strict=True)]
    width = max(x for x, _ in points)
    middle = (min(y for _, y in points) + max(y for _, y in points)) / 2
    return [([(x / width, (y - middle) / width) for x, y in points], False)]


def _round(radius: float) -> list[Point]:
    return [(radius * math.cos(step * math.pi / 60), radius * math.sin(step * math.pi / 60)) for step in range(120)]
