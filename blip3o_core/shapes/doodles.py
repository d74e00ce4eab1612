"""Shapes without a name, for the decoder only: it should be able to draw more than the six that texts tell of.

The decoders of the big models have seen far more than any prompt will ask for, too.
"""

import math

import numpy as np
from PIL import Image

from .facts import random_scene
from .world import Outline, Point, render

_WAVES = (2, 3, 4, 5)  # of a smooth outline, around it


def doodled_picture(rng: np.random.Generator) -> Image.Image:
    """Colours, sizes and places of a scene, 128 x 128; each object has an outline of its own."""
    return render(random_scene(rng), outline_of=lambda _: doodle(rng))


def doodle(rng: np.random.Generator) -> Outline:
    """One polygon, smooth or with three to eight corners; the box around it is centred and its longer side is 2."""
    if rng.random() < 0.5:
        angles = np.arange(120) * math.pi / 60
        radii = 1 + sum(float(rng.uniform(0, 0.7)) / wave * np.cos(wave * angles + rng.uniform(0, 2 * math.pi)) for wave in _WAVES)
    else:
        corners = int(rng.integers(3, 9))
        angles = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * math.pi / corners + rng.uniform(0, 2 * math.pi)
        radii = rng.uniform(0.45, 1, corners)
    around = np.stack((radii * np.cos(angles), radii * np.sin(angles)), axis=1)  # (points, 2)
    low, high = around.min(axis=0), around.max(axis=0)
    points: list[Point] = [(x, y) for x, y in ((around - (high + low) / 2) / ((high - low).max() / 2)).tolist()]
    return [(points, False)]
