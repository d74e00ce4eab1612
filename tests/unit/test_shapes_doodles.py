"""Shapes without a name keep to the places of a scene, and no two are alike."""

import math

import numpy as np

from blip3o_core.shapes.detector import detect
from blip3o_core.shapes.doodles import doodle, doodled_picture
from blip3o_core.shapes.facts import random_scene


def test_outlines_fill_a_centred_box_of_two_and_differ():
    rng = np.random.default_rng(0)
    outlines = [np.array(doodle(rng)[0][0]) for _ in range(50)]
    for points in outlines:
        low, high = points.min(axis=0), points.max(axis=0)
        assert np.allclose(low, -high)
        assert np.isclose((high - low).max(), 2)
        assert (high - low).min() > 0.3  # no line
    assert len({points.tobytes() for points in outlines}) == len(outlines)
    assert 10 < sum(len(points) == 120 for points in outlines) < 40  # smooth ones and polygons


def test_pictures_have_places_and_colours_of_a_scene_but_other_shapes():
    same = total = 0
    for seed in range(40):
        scene = random_scene(np.random.default_rng(seed))
        found = detect(doodled_picture(np.random.default_rng(seed)))
        assert found.background == scene.background
        for thing in found.objects:  # some are too thin to be found
            nearest = min(scene.objects, key=lambda other: math.dist(thing.centre, other.centre))
            assert thing.colour == nearest.colour and math.dist(thing.centre, nearest.centre) < 0.08
            same += thing.shape == nearest.shape
            total += 1
    assert total > 60
    assert same < 0.4 * total  # the nearest of six shapes, or "unknown": by chance the right one
