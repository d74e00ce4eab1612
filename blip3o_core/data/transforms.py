"""Augmentation that depends on nothing but the generator of its draw."""

import numpy as np
from PIL import Image


def augment(image: Image.Image, rng: np.random.Generator, flip: float, crop: str) -> tuple[Image.Image, str]:
    """Mirrors with probability `flip`; crop "random" cuts a square of the short side from anywhere, "centre" leaves the picture.

    The vision towers take the centre square themselves, which is the whole of a picture cropped here.
    Returns: the picture, and what was done to it, in few characters: equal descriptors of one picture mean equal pixels.
        Two numbers are always drawn from `rng`.
    """
    mirrored, place = rng.random() < flip, rng.random()
    box = "centre"
    short = min(image.size)
    if crop == "random" and max(image.size) > short:
        left, top = (int(place * (side - short + 1)) for side in image.size)
        image = image.crop((left, top, left + short, top + short))
        box = f"{left}.{top}.{short}"
    if mirrored:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image, f"flip{int(mirrored)}-{box}"
