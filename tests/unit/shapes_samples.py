"""What a decoder does to pictures, and scenes that differ in one fact."""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageFilter

from blip3o_core.shapes.world import BACKGROUNDS, COLOURS, SHAPES, Object, Scene, is_possible, pick, random_centre


def blurred(picture, rng):
    return picture.filter(ImageFilter.GaussianBlur(1))


def noisy(picture, rng):
    pixels = np.asarray(picture, np.float32)
    return Image.fromarray((pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8))


def compressed(picture, rng):
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=75)
    return Image.open(io.BytesIO(stream.getvalue()))


def shifted(picture, rng):
    """Each channel by up to 10 percent."""
    pixels = np.asarray(picture, np.float32) * rng.uniform(0.9, 1.1, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def everything(picture, rng):
    return compressed(noisy(blurred(shifted(picture, rng), rng), rng), rng)


def with_object(scene: Scene, index: int, **changes) -> Scene:
    objects = list(scene.objects)
    objects[index] = dataclasses.replace(objects[index], **changes)
    return Scene(tuple(objects), scene.background)


def altered(scene: Scene, what: str, rng: np.random.Generator, index: int = 0) -> Scene | None:
    """The scene with one thing changed; None if it can't be in this scene."""
    thing = scene.objects[index]
    for _ in range(60):
        if what == "colour":
            new = with_object(scene, index, colour=pick(rng, [name for name in COLOURS if name != thing.colour]))
        elif what == "shape":
            new = with_object(scene, index, shape=pick(rng, [name for name in SHAPES if name != thing.shape]))
        elif what == "size":
            new = with_object(scene, index, size="small" if thing.size == "large" else "large")
        elif what == "background":
            new = Scene(scene.objects, pick(rng, [name for name in BACKGROUNDS if name != scene.background]))
        elif what == "fewer":
            new = Scene(scene.objects[:index] + scene.objects[index + 1 :], scene.background)
        elif what == "more":
            extra = Object(thing.shape, thing.colour, "small", random_centre(rng, "small"))
            new = Scene((*scene.objects, extra), scene.background)
        elif what == "moved":
            new = with_object(scene, index, centre=random_centre(rng, thing.size))
            if np.hypot(*np.subtract(new.objects[index].centre, thing.centre)) < 0.12:
                continue
        else:
            assert what == "turned", what  # half a turn around the centre of the picture
            new = Scene(tuple(dataclasses.replace(t, centre=(1 - t.centre[0], 1 - t.centre[1])) for t in scene.objects), scene.background)
        if is_possible(new):
            return new
    return None
