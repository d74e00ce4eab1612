"""Picture -> Scene: what a drawn picture shows, found without a trained model.

Objects are what differs from the colour of the border. How much of a pixel an object covers (0 to 1) is read from where its colour
lies between background and object, so that antialiased and blurred edges count in part; this coverage is compared with that of each
shape, at the same spread around its centre of mass. Deterministic, numpy only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from .world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene, render

UNKNOWN = "unknown"
"""The shape of an object that resembles none of the known ones enough."""

SIDE = 128
_BORDER = 3  # pixels; world.MARGIN keeps objects off them
_FOREGROUND = 45  # RGB distance from the background: above noise, below half of world.MIN_CONTRAST
_MIN_AREA = 70  # pixels; the smallest object, a small star, covers 190
_MIN_SHARE = 0.2  # of a patch, for a second colour to be an object of its own
_MIN_COLOUR_GAP = 55  # RGB distance of their means: less than between yellow and orange, more than noise makes of one colour
_FULL_COLOUR = 0.6  # the other pixels of an object, nearer to the background, are not asked for its colour: thin ones are mostly edge
_MIN_LIKENESS = 0.7  # overlap with the most similar shape; right ones reach 0.85 through blur and noise
_GRID = 24  # samples per side of a normalised shape
_REACH = 2.1  # half the side of that grid, in spreads
_LARGE_FROM = (SIZES["small"] * SIZES["large"]) ** 0.5


@dataclass(frozen=True)
class _Template:
    shape: str
    coverage: np.ndarray  # (_GRID, _GRID) in 0..1
    spread: float  # root mean square distance from the centre of mass, of an object of radius 1
    offset: tuple[float, float]  # from the centre of mass to the middle of the box, of radius 1


def detect(picture: Image.Image, shapes: tuple[str, ...] = SHAPES) -> Scene:
    """Background and objects from left to right, of a picture of any size; one that is not square is stretched.

    Objects of one colour that touch count as one, whose shape is likely "unknown". shapes: those that it tells apart.
    """
    pixels = _pixels(picture)
    border = np.ones((SIDE, SIDE), bool)
    border[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    background = np.median(pixels[border], axis=0)  # (3,)
    distance = np.linalg.norm(pixels - background, axis=2)
    objects = [
        _classified(pixels, part, background, shapes)
        for patch in _patches(distance > _FOREGROUND)
        for part in _parts(pixels, patch, background)
    ]  # fmt: skip
    return Scene(tuple(sorted(objects, key=lambda thing: thing.centre)), _nearest(background, BACKGROUNDS))


def _pixels(picture: Image.Image) -> np.ndarray:
    """(SIDE, SIDE, 3) float32."""
    picture = picture.convert("RGB")
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return np.asarray(picture, np.float32)


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    distances = np.linalg.norm(np.array(list(palette.values()), np.float32) - colour, axis=1)
    return list(palette)[int(distances.argmin())]


def _patches(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Masks of the connected patches (4 neighbours) of at least _MIN_AREA pixels, in the order of their first pixel."""
    height, width = mask.shape
    waiting = np.pad(mask, 1).ravel().tolist()  # a frame of False: no neighbour is outside
    steps = (1, -1, width + 2, -width - 2)
    for start in np.flatnonzero(waiting).tolist():
        if not waiting[start]:
            continue
        waiting[start] = False
        found = [start]
        for place in found:  # grows while it is read
            for step in steps:
                if waiting[place + step]:
                    waiting[place + step] = False
                    found.append(place + step)
        if len(found) >= _MIN_AREA:
            patch = np.zeros((height + 2) * (width + 2), bool)
            patch[found] = True
            yield patch.reshape(height + 2, width + 2)[1:-1, 1:-1]


def _parts(pixels: np.ndarray, patch: np.ndarray, background: np.ndarray) -> Iterator[np.ndarray]:
    """The patch, or its parts if objects of clearly different colours touch in it."""
    inner = pixels[_eroded(patch)]  # (P, 3)
    palette = np.array(list(COLOURS.values()), np.float32)
    names = np.linalg.norm(inner[:, None] - palette, axis=2).argmin(axis=1)  # (P,)
    counts = np.bincount(names, minlength=len(palette))
    means: list[np.ndarray] = []
    for name in np.argsort(-counts, kind="stable").tolist():
        if counts[name] < max(_MIN_SHARE * len(inner), _MIN_AREA / 2):
            break
        mean = inner[names == name].mean(axis=0)
        if all(_gap(mean, other, background) >= _MIN_COLOUR_GAP for other in means):
            means.append(mean)
    if len(means) < 2:
        yield patch
        return
    owner = np.linalg.norm(pixels[:, :, None] - np.array(means), axis=3).argmin(axis=2)
    for number in range(len(means)):
        yield from _patches(patch & (owner == number))


def _gap(one: np.ndarray, other: np.ndarray, background: np.ndarray) -> float:
    """RGB distance of the colour nearer to the background from the way between the background and the other one: small for an edge."""
    near, far = sorted((one - background, other - background), key=np.linalg.norm)
    return float(np.linalg.norm(near - far * np.clip(near @ far / (far @ far), 0, 1)))


def _eroded(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _grown(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _classified(pixels: np.ndarray, patch: np.ndarray, background: np.ndarray, shapes: tuple[str, ...]) -> Object:
    distance = np.linalg.norm(pixels[patch] - background, axis=1)
    colour = np.median(pixels[patch][distance >= np.quantile(distance, _FULL_COLOUR)], axis=0)
    way = colour - background
    coverage = np.clip((pixels - background) @ way / max(float(way @ way), 1.0), 0, 1)
    coverage = np.where(_grown(_grown(patch)), coverage, 0)
    coverage = np.where(coverage < 0.2, 0, coverage)  # noise of the background
    x, y, spread = _moments(coverage)
    sampled = _sampled(coverage, x, y, spread)
    likeness = [_overlap(sampled, template.coverage) for template in _templates(shapes)]
    best = _templates(shapes)[int(np.argmax(likeness))]
    radius = spread / best.spread
    centre = (float((x + best.offset[0] * radius) / SIDE), float((y + best.offset[1] * radius) / SIDE))
    shape = best.shape if max(likeness) >= _MIN_LIKENESS else UNKNOWN
    return Object(shape, _nearest(colour, COLOURS), "large" if radius / SIDE >= _LARGE_FROM else "small", centre)


def _moments(coverage: np.ndarray) -> tuple[float, float, float]:
    """Centre of mass x, y and spread around it, in pixels."""
    total = float(coverage.sum())
    middles = np.arange(len(coverage)) + 0.5
    x, y = float(coverage.sum(axis=0) @ middles) / total, float(coverage.sum(axis=1) @ middles) / total
    variance = float(coverage.sum(axis=0) @ (middles - x) ** 2 + coverage.sum(axis=1) @ (middles - y) ** 2) / total
    return x, y, variance**0.5


def _sampled(coverage: np.ndarray, x: float, y: float, spread: float) -> np.ndarray:
    """(_GRID, _GRID), bilinear, at places relative to the centre of mass in spreads."""
    steps = np.linspace(-_REACH, _REACH, _GRID) * spread - 0.5
    padded = np.pad(coverage, SIDE)  # what lies outside the picture is background
    columns, rows = steps + x + SIDE, steps + y + SIDE
    left, top = np.floor(columns).astype(int), np.floor(rows).astype(int)
    right, bottom = columns - left, (rows - top)[:, None]
    upper = padded[np.ix_(top, left)] * (1 - right) + padded[np.ix_(top, left + 1)] * right
    lower = padded[np.ix_(top + 1, left)] * (1 - right) + padded[np.ix_(top + 1, left + 1)] * right
    return upper * (1 - bottom) + lower * bottom


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


@cache
def _templates(shapes: tuple[str, ...]) -> tuple[_Template, ...]:
    """Of both sizes, because antialiasing and sampling blur the small one more."""
    made = []
    for shape in shapes:
        for size, radius in SIZES.items():
            picture = np.asarray(render(Scene((Object(shape, "white", size, (0.5, 0.5)),), "black"), SIDE), np.float32)[:, :, 0]
            coverage = (picture - picture.min()) / (picture.max() - picture.min())
            x, y, spread = _moments(coverage)
            radius *= SIDE
            offset = (SIDE / 2 - x) / radius, (SIDE / 2 - y) / radius
            made.append(_Template(shape, _sampled(coverage, x, y, spread), spread / radius, offset))
    return tuple(made)
