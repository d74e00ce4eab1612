"""Whether a picture is on the screen, wherever it is drawn there."""

import io

import numpy as np
from PIL import Image
from skimage.feature import match_template


def likeness(screen: bytes, picture: Image.Image, scale: float) -> float:
    """Correlation of the picture with that place of the screen which is most like it: 1 if it is there, about 0 if it isn't.

    Args:
        screen: a screenshot, PNG.
        picture: what should be there.
        scale: pixels of the screen for each pixel of the picture.
    """
    size = [round(side * scale) for side in picture.size]
    looked_for = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BILINEAR), np.float64)
    return float(match_template(np.asarray(Image.open(io.BytesIO(screen)).convert("RGB"), np.float64), looked_for).max())
