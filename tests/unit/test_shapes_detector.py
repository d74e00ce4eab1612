"""The detector finds what was drawn, also through what a decoder does to pictures, and calls nothing a shape that is none."""

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw

from blip3o_core.shapes.detector import UNKNOWN, detect
from blip3o_core.shapes.facts import random_scene
from blip3o_core.shapes.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene, backgrounds_for, render

from . import shapes_samples as damage


def is_same(scene: Scene, found: Scene) -> bool:
    if scene.background != found.background or len(scene.objects) != len(found.objects):
        return False
    for thing in scene.objects:
        nearest = min(found.objects, key=lambda other: math.dist(thing.centre, other.centre))
        if math.dist(thing.centre, nearest.centre) > 0.02 or nearest != Object(thing.shape, thing.colour, thing.size, nearest.centre):
            return False
    return True


@pytest.mark.parametrize("kind, scenes, at_least", [
    ("clean", 200, 0.99), ("blurred", 50, 0.97), ("noisy", 50, 0.97), ("compressed", 50, 0.97), ("shifted", 50, 0.97),
    ("everything", 50, 0.97),
])  # fmt: skip
def test_scenes_are_found_entirely(kind, scenes, at_least):
    """Measured on 1000 scenes each: all of them, of every kind."""
    rng, change = np.random.default_rng(2), getattr(damage, kind, lambda picture, rng: picture)
    right = 0
    for _ in range(scenes):
        scene = random_scene(rng)
        right += is_same(scene, detect(change(render(scene), rng)))
    assert right >= at_least * scenes


@pytest.mark.parametrize("side", [64, 96, 256, 512])
def test_the_size_of_the_picture_does_not_matter(side):
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng) for _ in range(15)]
    assert all(is_same(scene, detect(render(scene, side))) for scene in scenes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
def test_every_shape_is_told_in_every_colour_and_size_on_every_background(shape, size):
    for colour in COLOURS:
        for background in backgrounds_for([colour]):
            scene = Scene((Object(shape, colour, size, (0.4, 0.6)),), background)
            assert is_same(scene, detect(render(scene)))


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_a_plain_picture_has_a_background_and_no_objects(background):
    assert detect(Image.new("RGB", (128, 128), BACKGROUNDS[background])) == Scene((), background)


def test_specks_are_no_objects():
    picture = Image.new("RGB", (128, 128), BACKGROUNDS["white"])
    ImageDraw.Draw(picture).rectangle((30, 30, 35, 35), fill=COLOURS["red"])
    assert detect(picture).objects == ()


def test_objects_of_different_colours_that_touch_are_two():
    picture = render(Scene((Object("square", "red", "large", (0.3, 0.5)),), "white"))
    picture.paste(render(Scene((Object("square", "blue", "large", (0.3, 0.5)),), "white")).crop((19, 43, 57, 85)), (57, 43))
    found = detect(picture)
    assert [(thing.shape, thing.colour) for thing in found.objects] == [("square", "red"), ("square", "blue")]



@pytest.mark.parametrize("draw", [
    lambda draw: draw.rectangle((20, 58, 108, 70), fill=COLOURS["red"]),
    lambda draw: draw.line((30, 30, 98, 98), fill=COLOURS["red"], width=10),
    lambda draw: draw.arc((30, 30, 98, 98), 0, 200, fill=COLOURS["red"], width=10),
    lambda draw: draw.polygon([(30, 30), (98, 30), (64, 64), (98, 98), (30, 98), (64, 64)], fill=COLOURS["red"]),
])  # fmt: skip
def test_what_resembles_no_shape_is_unknown(draw):
    picture = Image.new("RGB", (128, 128), BACKGROUNDS["white"])
    draw(ImageDraw.Draw(picture))
    assert [(thing.shape, thing.colour) for thing in detect(picture).objects] == [(UNKNOWN, "red")]


def test_the_same_picture_always_gives_the_same_scene():
    picture = damage.everything(render(random_scene(np.random.default_rng(4))), np.random.default_rng(5))
    assert detect(picture) == detect(picture.copy())
