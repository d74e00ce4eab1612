"""Pictures as users have them -> upright RGB pictures -> the pixel tensors of the two vision towers.

Both towers take CLIP's normalisation; they differ in how a picture is brought to size. PIL does all resizing, as in the
reference: bicubic filters of other libraries differ by more than the rounding to 8 bits.

B batch, H x W pixels.
"""

import io
import math
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from .errors import InputError

MAX_PIXELS = 178_956_970  # Pillow's own default limit; kept here because a host may have switched that off
STRIP_PIXELS = 2**22
MAX_ASPECT_RATIO = 200  # Qwen2.5-VL's processor refuses thinner pictures
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
OVERSHOOT = 0.5  # a tensor may leave 0..1 by this much (bicubic upscaling does) and is clamped; more is another range

_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError, RuntimeError,
            AssertionError, AttributeError, struct.error, zlib.error)  # what Pillow's readers raise on damaged files; found by fuzzing
_DRAWINGS = ("EPS", "WMF")  # Pillow would start Ghostscript, or has a loader on one system only
_WIDE_GREYS = ("I", "F")  # beginnings of the modes with more than 8 bits per pixel: I, I;16, I;16B, F
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def load_image(path: str | Path) -> Image.Image:
    """Reads one picture as RGB: turned upright by its EXIF orientation, transparency on white, an animation's first frame.

    Greys of 16 bits are scaled from 0..65535, other wide greys as in `to_rgb_images`; colour profiles are ignored, as in the
    reference. No setting of Pillow is changed.
    Raises: InputError that names the file if it is missing, a folder, no picture, damaged, or larger than MAX_PIXELS.
    """
    path = Path(os.path.expanduser(path))  # a file may be called ~name; Path.expanduser raises then
    _require_regular_file(path)
    return _read(path, path)


def load_image_bytes(content: bytes, name: str) -> Image.Image:
    """As `load_image`, from what a file holds; `name` is for messages."""
    return _read(io.BytesIO(content), name)


def _read(source: Path | io.BytesIO, name: str | Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large pictures and odd metadata; what matters is raised here
        try:
            with Image.open(source) as image:
                return _to_rgb(image, name)
        except InputError:
            raise
        except UnidentifiedImageError:
            raise InputError(f"{name}: not a picture in a format that can be read here. A web page or a Git LFS pointer saved "
                             "under a picture's name looks like this; download it again, or save it as PNG or JPEG.") from None
        except Image.DecompressionBombError:
            raise _too_large(name) from None
        except _DAMAGED as error:
            raise _damaged(name, error) from error


def to_rgb_images(
    images: Image.Image | Tensor | Sequence[Image.Image | Tensor], *, channels_last: bool | None = None
) -> list[Image.Image]:
    """One picture, a batch, or a list of either -> upright RGB pictures, in order.

    PIL pictures may have any mode and are converted as by `load_image`. Mode I (32-bit integers) is scaled from 0..65535, mode
    F from 0..1 or 0..255, whichever holds its values; where values leave that, from their own range including 0.
    Tensors are float, in 0..1, and either channels first, (3, H, W) or (B, 3, H, W), or channels last as in ComfyUI,
    (H, W, 3 or 4) or (B, H, W, 3 or 4); the fourth channel is opacity. The inputs are not changed.
    channels_last says which of the two tensors are, for pictures of 3 or 4 pixels on a side; None tells it from the shape.
    Raises: InputError for other types, shapes that fit both layouts or none, integers, nan, and values far outside of 0..1.
    """
    given = [images] if isinstance(images, Image.Image | Tensor) else images
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise InputError(f"a picture can't be a {type(images).__name__}. Give a PIL image or a tensor; load_image reads files.")
    if not given:
        raise InputError("no picture was given; give at least one.")
    converted = []
    for index, item in enumerate(given):
        name = f"picture {index + 1} of {len(given)}"
        if isinstance(item, Tensor):
            converted += [_to_rgb(image, name) for image in _tensor_to_pil(item, name, channels_last)]
        elif isinstance(item, Image.Image):
            converted.append(_to_rgb(item, name))
        else:
            raise InputError(f"{name} is a {type(item).__name__}. Give a PIL image or a tensor; load_image reads files.")
    return converted


def qwen_pixel_values(
    images: Sequence[Image.Image], *, min_pixels: int = 4 * 28 * 28, max_pixels: int = 16384 * 28 * 28,
    size: tuple[int, int] | None = None, patch_size: int = 14, merge_size: int = 2, temporal_patch_size: int = 2,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Patches for Qwen2.5-VL's vision tower, of any number of pictures of any size.

    Args:
        min_pixels, max_pixels: bounds of a picture's area after resizing; the defaults are the published processor's.
        size: (width, height) to squeeze each picture to first; the published image-conditioned pipeline uses (448, 448).
    Returns: (pixel_values (sum of h * w, 3 * temporal * patch * patch) float32, grid_thw (n, 3) int64 with t = 1 and h, w in
        patches). Patches are grouped by merge cells: cell row, cell column, row in the cell, column in the cell.
    Raises: InputError if a picture is more than 200 times as long as wide (after `size`), or the bounds contradict each other.
    Source: Qwen2-VL's image processor, with qwen_vl_utils' rule that no side gets shorter than one merge cell.
    """
    if not 0 < min_pixels <= max_pixels:
        raise InputError(f"min_pixels={min_pixels} and max_pixels={max_pixels} leave no size; 0 < min_pixels <= max_pixels.")
    cell = patch_size * merge_size
    patches, grids = [], []
    for image in to_rgb_images(images):
        if size is not None:
            image = image.resize(size, Image.Resampling.BICUBIC)
        width, height = _qwen_size(image.size, cell, min_pixels, max_pixels)
        pixels = _normalised(image.resize((width, height), Image.Resampling.BICUBIC))  # (3, H, W)
        rows, columns = height // cell, width // cell
        cells = pixels.reshape(3, rows, merge_size, patch_size, columns, merge_size, patch_size)
        cells = cells.permute(1, 4, 2, 5, 0, 3, 6)  # (rows, columns, merge, merge, 3, patch, patch)
        frames = cells.unsqueeze(5).expand(*cells.shape[:5], temporal_patch_size, *cells.shape[5:])  # a still repeats itself
        patches.append(frames.reshape(rows * columns * merge_size**2, -1))  # (h * w, 3 * temporal * patch * patch)
        grids.append((1, rows * merge_size, columns * merge_size))
    return torch.cat(patches), torch.tensor(grids, dtype=torch.int64)


def eva_pixel_values(images: Sequence[Image.Image], *, size: int = 448, crop_first: bool = False) -> Tensor:
    """Pixels for EVA-CLIP -> (B, 3, size, size) float32: the centre square of each picture.

    Args:
        crop_first: False resizes the short side, then crops: the training targets. True crops, then resizes: the reference's
            reconstruction demo. The two differ by 0.08 on average in normalised units; they are not interchangeable.
    Raises: InputError if a picture is more than 200 times as long as wide.
    """
    return torch.stack([_normalised(_centre_square(image, size, crop_first)) for image in to_rgb_images(images)])


def siglip_pixel_values(images: Sequence[Image.Image], *, size: int = 512, squeeze: bool = False) -> Tensor:
    """Pixels for SigLIP2 -> (B, 3, size, size) float32 in -1..1.

    Args:
        squeeze: False takes the centre square, its short side brought to size; True squeezes the whole picture, as the reference's demo.
    Raises: InputError if a picture is more than 200 times as long as wide.
    """
    pixels = []
    for image in to_rgb_images(images):
        _require_aspect_ratio(image.size)
        square = (image.resize((size, size), Image.Resampling.BILINEAR) if squeeze
                  else _centre_square(image, size, crop_first=False, resample=Image.Resampling.BILINEAR))  # fmt: skip
        pixels.append(torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(255).sub(0.5).div(0.5))
    return torch.stack(pixels)


def _require_regular_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file. Check the name and the folder.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: can't be read ({error}). Check the path and its permissions.") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: a folder, not a picture. Give one file of it.")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: a device or a pipe, not a picture. Give a picture file.")


def _to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    """A new, upright RGB picture without metadata; `name` is for messages."""
    if 0 in image.size:
        raise InputError(f"{name}: has no pixels ({image.width} x {image.height}). Give another picture.")
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(name, image.size)
    if image.format in _DRAWINGS:
        raise InputError(f"{name}: an {image.format} drawing, not a picture of pixels. Export it as PNG.")
    try:
        image.load()
        orientation = _orientation(image)  # after load: the TIFF reader turns pictures itself and then drops the tag
        if image.mode.startswith(_WIDE_GREYS):
            rgb = _narrow_grey(image, name).convert("RGB")
        elif image.has_transparency_data:
            rgb = _on_white(image.convert("LA") if image.mode == "La" else image)
        else:
            rgb = image.convert("RGB")
    except InputError:
        raise
    except _DAMAGED as error:
        raise _damaged(name, error) from error
    rgb.info = {}  # a tag that stayed would turn the picture once more in the next conversion
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except _DAMAGED:
        return 1  # unreadable EXIF is no EXIF; the pixels are whole


def _narrow_grey(image: Image.Image, name: str | Path) -> Image.Image:
    values = np.asarray(image)
    low, high = (float(np.float32(bound)) for bound in (values.min(), values.max()))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{name}: holds nan or infinite pixels. Save it again with finite values.")
    tops = (1.0, 255.0) if image.mode == "F" else (65535.0,)
    top = next((top for top in tops if low >= 0 and high <= top), None)
    low, high = (0.0, top) if top is not None else (min(low, 0.0), max(high, 0.0))
    levels = np.empty(values.shape, np.uint8)
    for rows in _strips(image):
        levels[rows] = np.rint((values[rows].astype(np.float32) - low) * (255 / (high - low))).astype(np.uint8)
    key = image.info.get("transparency")
    if isinstance(key, int):  # the one grey that a PNG declares transparent
        levels[values == key] = 255
    return Image.fromarray(levels)


def _on_white(image: Image.Image) -> Image.Image:
    """RGB; in strips, for a whole picture would be in memory four times."""
    rgb = Image.new("RGB", image.size)
    for rows in _strips(image):
        strip = image.crop((0, rows.start, image.width, rows.stop)).convert("RGBA")
        white = Image.new("RGBA", strip.size, "white")
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, rows.start))
    return rgb


def _strips(image: Image.Image) -> list[slice]:
    """Rows that together have about STRIP_PIXELS pixels, from top to bottom."""
    height = max(1, STRIP_PIXELS // image.width)
    return [slice(top, min(top + height, image.height)) for top in range(0, image.height, height)]


def _tensor_to_pil(tensor: Tensor, name: str, channels_last: bool | None) -> list[Image.Image]:
    """(3, H, W), (B, 3, H, W), (H, W, 3 or 4) or (B, H, W, 3 or 4), float in 0..1 -> RGB or RGBA pictures, rounded to 8 bits."""
    shape = list(tensor.shape)
    if not tensor.is_floating_point():
        raise InputError(f"{name} is a tensor of {tensor.dtype}. Give floats in 0..1 (divide 8-bit values by 255).")
    first = len(shape) in (3, 4) and shape[-3] == 3 and channels_last is not True
    last = len(shape) in (3, 4) and shape[-1] in (3, 4) and channels_last is not False
    if first == last:
        problem = "fits both channels first and channels last" if first else "is no picture"
        raise InputError(f"{name} is a tensor of shape {shape}, which {problem}. Give (B, H, W, 3 or 4) or (B, 3, H, W), "
                         "or a PIL image.")
    if 0 in shape:
        raise InputError(f"{name} is a tensor of shape {shape}, which holds no pixels.")
    values = tensor.detach().to(device="cpu", dtype=torch.float32)
    low, high = (bound.item() for bound in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{name} holds nan or infinite values. The node or model that made it has failed.")
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise InputError(f"{name} holds values from {low:.3g} to {high:.3g}. Scale it to 0..1.")
    values = values.movedim(-3, -1) if first else values  # (..., H, W, channels)
    levels = values.clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(picture.contiguous().numpy()) for picture in (levels if levels.ndim == 4 else levels[None])]


def _qwen_size(size: tuple[int, int], cell: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(width, height) in multiples of `cell`, near the given one, with an area within the bounds where that is possible."""
    _require_aspect_ratio(size)
    width, height = (max(cell, round(side / cell) * cell) for side in size)
    if width * height > max_pixels:
        shrink = math.sqrt(size[0] * size[1] / max_pixels)
        width, height = (max(cell, math.floor(side / shrink / cell) * cell) for side in size)
    elif width * height < min_pixels:
        grow = math.sqrt(min_pixels / (size[0] * size[1]))
        width, height = (math.ceil(side * grow / cell) * cell for side in size)
    return width, height


def _centre_square(
    image: Image.Image, size: int, crop_first: bool, resample: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    _require_aspect_ratio(image.size)
    short = min(image.size)
    if crop_first:
        left, top = ((side - short) // 2 for side in image.size)
        return image.crop((left, top, left + short, top + short)).resize((size, size), resample)
    image = image.resize([int(size * side / short) for side in image.size], resample)
    left, top = (round((side - size) / 2) for side in image.size)  # ties to even, as in the reference
    return image.crop((left, top, left + size, top + size))


def _normalised(image: Image.Image) -> Tensor:
    """RGB picture -> (3, H, W) float32, minus CLIP's mean, divided by its deviation."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    return (pixels - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]


def _require_aspect_ratio(size: tuple[int, int]) -> None:
    if max(size) > MAX_ASPECT_RATIO * min(size):
        raise InputError(f"a picture of {size[0]} x {size[1]} is more than {MAX_ASPECT_RATIO} times as long as wide, "
                         "which the vision models refuse. Crop it.")


def _too_large(name: str | Path, size: tuple[int, int] | None = None) -> InputError:
    found = f"{size[0]} x {size[1]} pixels are" if size else "it has"
    return InputError(f"{name}: {found} more than the limit of {MAX_PIXELS:,}. Make it smaller; the models see at most "
                      "a few megapixels.")


def _damaged(name: str | Path, error: BaseException) -> InputError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return InputError(f"{name}: the picture is damaged or cut off, or stored in a way that can't be read ({reason}). Download or "
                      "export it again, as PNG or JPEG.")
