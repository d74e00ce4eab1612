"""Pictures as users have them: every format becomes the RGB that a viewer shows, every bad file an error that says why."""

import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image, ImageFile

from blip3o_core import images
from blip3o_core.errors import InputError
from blip3o_core.images import eva_pixel_values, load_image, qwen_pixel_values, to_rgb_images
from blip3o_core.pipelines.language import merged_grids

PHOTOS = Path(skimage.__file__).parent / "data"  # photographs in the wheel: astronaut, coffee, rocket (JPEG), ...


def pixels(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


def photo(name: str = "coffee.png", size: tuple[int, int] = (60, 40)) -> Image.Image:
    return Image.open(PHOTOS / name).convert("RGB").resize(size)


@pytest.fixture
def corners() -> Image.Image:
    """4 x 2, a colour of its own in each corner: any wrong turn shows."""
    array = np.zeros((2, 4, 3), np.uint8)
    array[0, 0], array[0, 3], array[1, 0], array[1, 3] = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)
    return Image.fromarray(array)


# --- what can be read


@pytest.mark.parametrize(("name", "size"), [("astronaut.png", (512, 512)), ("coffee.png", (600, 400)), ("rocket.jpg", (640, 427))])
def test_photographs_are_read_as_they_are(name, size):
    image = load_image(PHOTOS / name)
    assert (image.size, image.mode) == (size, "RGB")
    assert np.array_equal(pixels(image), np.asarray(Image.open(PHOTOS / name)))
    assert np.array_equal(pixels(load_image(str(PHOTOS / name))), pixels(image))


def test_transparency_lies_on_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)  # opaque, clear, one fifth
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert pixels(load_image(tmp_path / "a.png")).tolist() == [[[255, 0, 0], [255, 255, 255], [204, 204, 204]]]


def test_grey_with_and_without_opacity(tmp_path):
    Image.fromarray(np.array([[0, 100, 255]], np.uint8)).save(tmp_path / "l.png")
    assert pixels(load_image(tmp_path / "l.png")).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    Image.merge("LA", [Image.new("L", (1, 1), 100), Image.new("L", (1, 1), 0)]).save(tmp_path / "la.png")
    assert pixels(load_image(tmp_path / "la.png")).tolist() == [[[255] * 3]]


def test_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert pixels(load_image(tmp_path / "opaque.png")).tolist() == [[[255, 0, 0], [0, 0, 255]]]
    assert pixels(load_image(tmp_path / "clear.png")).tolist() == [[[255, 255, 255], [0, 0, 255]]]


def test_premultiplied_and_bilevel_pictures():
    straight = Image.new("RGBA", (1, 1), (255, 0, 0, 0))
    for image, expected in ((straight.convert("RGBa"), 255), (Image.new("LA", (1, 1), (9, 0)).convert("La"), 255),
                            (Image.new("1", (1, 1), 1), 255), (Image.new("1", (1, 1), 0), 0)):  # fmt: skip
        assert pixels(to_rgb_images(image)[0]).tolist() == [[[expected] * 3]]


@pytest.mark.parametrize("mode", ["HSV", "YCbCr", "LAB", "RGBX", "CMYK"])
def test_other_colour_spaces(mode):
    red = Image.new("RGB", (1, 1), (200, 30, 40))
    difference = np.abs(pixels(to_rgb_images(red.convert(mode))[0]).astype(int) - pixels(red))
    assert difference.max() <= 4  # measured 3 (HSV), 2 (LAB, YCbCr), 0


def test_16_bit_greys_are_scaled_not_clipped(tmp_path):
    values = np.array([[0, 256, 32896, 65535]], np.uint16)  # 257 steps make one of 8 bits; 32896 is 128 * 257
    Image.fromarray(values).save(tmp_path / "grey.png")
    assert pixels(load_image(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 1, 128, 255]
    big_endian = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert pixels(to_rgb_images(big_endian)[0])[0, :, 2].tolist() == [0, 1, 128, 255]


def test_16_bit_grey_with_a_transparent_level(tmp_path):
    Image.fromarray(np.array([[0, 500, 65535]], np.uint16)).save(tmp_path / "grey.png", transparency=500)
    assert pixels(load_image(tmp_path / "grey.png"))[0, :, 0].tolist() == [0, 255, 255]


@pytest.mark.parametrize(("values", "dtype", "expected"), [
    ([0, 32896, 65535], np.int32, [0, 128, 255]),  # what older readers make of a 16-bit PNG
    ([0, 501_961, 1_000_000], np.int32, [0, 128, 255]),
    ([-100, 0, 100], np.int32, [0, 128, 255]),
    ([0.0, 0.5, 1.0], np.float32, [0, 128, 255]),
    ([0.0, 128.0, 255.0], np.float32, [0, 128, 255]),
    ([-1.0, 0.0, 1.0], np.float32, [0, 128, 255]),
])  # fmt: skip
def test_wide_greys_use_their_own_range(tmp_path, values, dtype, expected):
    Image.fromarray(np.array([values], dtype)).save(tmp_path / "grey.tif")
    assert pixels(load_image(tmp_path / "grey.tif"))[0, :, 1].tolist() == expected


def test_cmyk_jpeg(tmp_path):
    photo().convert("CMYK").save(tmp_path / "print.jpg", quality=95)
    difference = np.abs(pixels(load_image(tmp_path / "print.jpg")).astype(int) - pixels(photo()))
    assert difference.mean() < 4  # measured 1.4 of 255: JPEG at quality 95 without chroma planes; inverted it is above 100


@pytest.mark.parametrize("suffix", ["png", "tif", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, corners, suffix, orientation):
    stored = {1: corners, 2: corners.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 3: corners.rotate(180),
              4: corners.transpose(Image.Transpose.FLIP_TOP_BOTTOM), 5: corners.transpose(Image.Transpose.TRANSPOSE),
              6: corners.rotate(90, expand=True), 7: corners.transpose(Image.Transpose.TRANSVERSE),
              8: corners.rotate(-90, expand=True)}[orientation]  # fmt: skip
    stored = stored.resize([64 * side for side in stored.size], Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"phone.{suffix}", exif=exif)
    loaded = load_image(tmp_path / f"phone.{suffix}")
    shown = pixels(loaded)[32::64, 32::64]
    assert np.abs(shown.astype(int) - pixels(corners)).max() <= (2 if suffix == "jpg" else 0)  # measured 1 as JPEG
    assert np.array_equal(pixels(to_rgb_images(loaded)[0]), pixels(loaded)), "turned twice"
    with Image.open(tmp_path / f"phone.{suffix}") as image:
        assert np.array_equal(pixels(to_rgb_images(image)[0]), pixels(loaded))


def test_unreadable_exif_leaves_the_picture_as_it_is(tmp_path, corners):
    corners.save(tmp_path / "a.png", exif=b"Exif\0\0 no tags here at all")
    assert np.array_equal(pixels(load_image(tmp_path / "a.png")), pixels(corners))


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_an_animation_gives_its_first_frame(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
    assert Image.open(tmp_path / f"a.{suffix}").n_frames == 2
    assert pixels(load_image(tmp_path / f"a.{suffix}"))[8, 8].tolist() == [255, 0, 0]


def test_the_given_picture_is_not_changed():
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.new("RGBA", (4, 2), (255, 0, 0, 10))
    image.info["exif"] = exif.tobytes()
    before = (image.mode, image.size, image.tobytes(), dict(image.info))
    assert to_rgb_images(image)[0].size == (2, 4)
    assert (image.mode, image.size, image.tobytes(), dict(image.info)) == before


# --- what can't


def test_a_missing_file(tmp_path):
    with pytest.raises(InputError, match=r"cat\.png: there is no such file"):
        load_image(tmp_path / "cat.png")


def test_a_folder(tmp_path):
    with pytest.raises(InputError, match="a folder, not a picture"):
        load_image(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system here")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match="a device or a pipe"):
        load_image(tmp_path / "pipe.png")


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000])
def test_impossible_paths(path):
    with pytest.raises(InputError, match="can't be read|no such file"):
        load_image(path)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\n", b"", b"<html></html>"])
def test_a_text_file_named_png(tmp_path, content):
    (tmp_path / "cat.png").write_bytes(content)
    with pytest.raises(InputError, match=r"cat\.png: not a picture"):
        load_image(tmp_path / "cat.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_a_truncated_picture(tmp_path, suffix):
    file = tmp_path / f"cut.{suffix}"
    photo(size=(300, 200)).save(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"cut\.{suffix}: .*(damaged or cut off|not a picture)"):
        load_image(file)


def test_a_truncated_picture_that_pillow_has_opened(tmp_path):
    photo(size=(300, 200)).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:4000])
    with Image.open(tmp_path / "cut.jpg") as image, pytest.raises(InputError, match="picture 1 of 1: .*damaged or cut off"):
        to_rgb_images(image)


@pytest.mark.parametrize("limit", [None, Image.MAX_IMAGE_PIXELS, 10])  # switched off by a host, Pillow's, lower
def test_a_decompression_bomb(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (tmp_path / "bomb.ppm").write_bytes(b"P5 20000 20000 255\n")
    with pytest.raises(InputError, match=r"bomb\.ppm: .*more than the limit of 178,956,970"):
        load_image(tmp_path / "bomb.ppm")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_on_pixels(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 8)
    assert to_rgb_images(Image.new("L", (4, 2)))[0].size == (4, 2)
    with pytest.raises(InputError, match="picture 1 of 1: 3 x 3 pixels are more than the limit of 8"):
        to_rgb_images(Image.new("L", (3, 3)))


def test_no_warning_leaks_and_pillow_keeps_its_settings(tmp_path, monkeypatch):
    photo(size=(12, 12)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # 144 pixels: Pillow warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "a.png").size == (12, 12)
    assert (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES) == (100, False)


def test_drawings_start_no_other_program(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with pytest.raises(InputError, match="an EPS drawing"):
        load_image(tmp_path / "a.png")


def test_pictures_without_pixels_or_with_nan(tmp_path):
    with pytest.raises(InputError, match="has no pixels .0 x 5"):
        to_rgb_images(Image.new("RGB", (0, 5)))
    Image.fromarray(np.array([[0, np.nan]], np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(InputError, match=r"nan\.tif: holds nan or infinite"):
        load_image(tmp_path / "nan.tif")


# --- tensors


def as_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(pixels(image).copy()).float() / 255  # (H, W, 3)


@pytest.mark.parametrize("layout", ["CHW", "BCHW", "HWC", "BHWC", "BHWA"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_tensors_of_every_layout_give_back_the_picture(layout, dtype):
    image = photo()
    tensor = as_tensor(image).to(dtype)
    if layout == "BHWA":
        tensor = torch.cat((tensor, torch.ones_like(tensor[..., :1])), dim=-1)
    if "CHW" in layout:
        tensor = tensor.permute(2, 0, 1)
    if layout.startswith("B"):
        tensor = torch.stack((tensor, tensor))
    converted = to_rgb_images(tensor.requires_grad_())
    assert len(converted) == (2 if layout.startswith("B") else 1)
    assert all(np.array_equal(pixels(one), pixels(image)) for one in converted)


def test_pictures_and_tensors_may_be_mixed():
    image = photo()
    batch = torch.stack((as_tensor(image), as_tensor(image)))
    assert [one.size for one in to_rgb_images([batch, image, batch[:1]])] == [image.size] * 4


def test_a_tensor_with_opacity_lies_on_white():
    assert pixels(to_rgb_images(torch.tensor([[[1.0, 0.0, 0.0, 0.2]]]))[0]).tolist() == [[[255, 204, 204]]]


def test_overshoot_of_an_upscaler_is_clamped():
    assert pixels(to_rgb_images(torch.tensor([[[-0.1, 0.5, 1.2]]]))[0]).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize(("tensor", "message"), [
    (torch.zeros(3, 5, 3), r"\[3, 5, 3\], which fits both"),
    (torch.zeros(2, 3, 5, 4), "fits both"),
    (torch.zeros(5, 5), "is no picture"),
    (torch.zeros(1, 8, 8, 2), "is no picture"),
    (torch.zeros(4, 8, 8), "is no picture"),
    (torch.zeros(1, 1, 3, 8, 8), "is no picture"),
    (torch.zeros(0, 8, 8, 3), "holds no pixels"),
    (torch.zeros(3, 0, 8), "holds no pixels"),
    (torch.full((8, 8, 3), float("nan")), "nan or infinite"),
    (torch.full((8, 8, 3), float("inf")), "nan or infinite"),
    (torch.full((8, 8, 3), 200.0), r"values from 200 to 200\. Scale it to 0\.\.1"),
    (torch.full((8, 8, 3), -1.0), "Scale it"),
    (torch.zeros(8, 8, 3, dtype=torch.uint8), "uint8. Give floats"),
])  # fmt: skip
def test_tensors_that_are_no_pictures(tensor, message):
    with pytest.raises(InputError, match=message):
        to_rgb_images(tensor)


@pytest.mark.parametrize("given", ["cat.png", b"png", None, 3, np.zeros((8, 8, 3)), ["cat.png"], [None], []])
def test_other_things_are_no_pictures(given):
    with pytest.raises(InputError, match="Give a PIL image or a tensor|no picture was given"):
        to_rgb_images(given)


# --- pixel values


def test_one_pixel_is_enlarged():
    dot = Image.new("RGB", (1, 1), "red")
    values, grid = qwen_pixel_values([dot])
    assert (list(values.shape), grid.tolist()) == ([16, 1176], [[1, 4, 4]])
    assert eva_pixel_values([dot]).shape == (1, 3, 448, 448)
    assert torch.equal(eva_pixel_values([dot]), eva_pixel_values([dot], crop_first=True))


@pytest.mark.parametrize("size", [(8000, 3), (3, 8000)])
def test_a_thread_of_a_picture_is_refused(size):
    thread = Image.new("RGB", size)
    message = re.escape(f"a picture of {size[0]} x {size[1]} is more than 200 times as long as wide")
    for refuse in (qwen_pixel_values, eva_pixel_values, lambda pictures: eva_pixel_values(pictures, crop_first=True)):
        with pytest.raises(InputError, match=message):
            refuse([thread])
    assert qwen_pixel_values([thread], size=(448, 448))[1].tolist() == [[1, 32, 32]]  # squeezed as published
    ribbon = Image.new("RGB", tuple(min(side, 600) for side in size))  # exactly 200
    assert qwen_pixel_values([ribbon])[1].sort().values.tolist() == [[1, 2, 42]]
    assert eva_pixel_values([ribbon]).shape == (1, 3, 448, 448)


def test_patches_of_several_pictures_follow_each_other():
    first, second = photo(size=(600, 400)), photo("rocket.jpg", size=(300, 500))
    values, grid = qwen_pixel_values([first, second])
    alone = [qwen_pixel_values([image]) for image in (first, second)]
    assert torch.equal(values, torch.cat([values for values, _ in alone]))
    assert grid.tolist() == [[1, 28, 42], [1, 36, 22]]
    assert [t * h * w for t, h, w in merged_grids(grid)] == [14 * 21, 18 * 11]
    assert (values.dtype, grid.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("size", [(3000, 2000), (2000, 300), (300, 2000), (90, 30)])
def test_the_area_stays_within_its_bounds(size):
    _, grid = qwen_pixel_values([Image.new("RGB", size)], min_pixels=200 * 784, max_pixels=300 * 784)
    assert 200 <= math.prod(merged_grids(grid)[0]) <= 300


def test_no_side_gets_shorter_than_a_merge_cell():
    _, grid = qwen_pixel_values([Image.new("RGB", (10_000, 100))], max_pixels=20 * 784)
    assert grid.tolist() == [[1, 2, 2 * 44]]


def test_a_fixed_size_squeezes():
    image = photo(size=(600, 400))
    values, grid = qwen_pixel_values([image], size=(448, 448))
    squeezed, _ = qwen_pixel_values([image.resize((448, 448), Image.Resampling.BICUBIC)])
    assert torch.equal(values, squeezed)
    assert (grid.tolist(), [t * h * w for t, h, w in merged_grids(grid)]) == ([[1, 32, 32]], [256])


@pytest.mark.parametrize("bounds", [dict(min_pixels=0), dict(max_pixels=100), dict(min_pixels=5000, max_pixels=4000)])
def test_bounds_that_leave_no_size(bounds):
    with pytest.raises(InputError, match="leave no size"):
        qwen_pixel_values([photo()], **bounds)


def test_the_centre_square_of_eva():
    wide = Image.new("RGB", (1344, 448), "black")
    wide.paste(Image.new("RGB", (448, 448), "white"), (448, 0))
    for crop_first in (False, True):
        values = eva_pixel_values([wide, wide.transpose(Image.Transpose.ROTATE_90)], crop_first=crop_first)
        white = eva_pixel_values([Image.new("RGB", (448, 448), "white")], crop_first=crop_first)
        assert torch.equal(values, white.expand(2, -1, -1, -1))
    assert eva_pixel_values([photo()], size=28).shape == (1, 3, 28, 28)


@pytest.mark.parametrize(("size", "resized", "top"), [
    ((300, 401), (448, 598), 75),  # 598.8 is cut, not rounded
    ((448, 599), (448, 599), 76),  # half of 151 is rounded to even,
    ((448, 597), (448, 597), 74),  # and so is half of 149
])  # fmt: skip
def test_rounding_of_the_long_side_and_of_the_crop(size, resized, top):
    image = photo(size=size)
    square = image.resize(resized, Image.Resampling.BICUBIC).crop((0, top, 448, top + 448))
    assert torch.equal(eva_pixel_values([image]), eva_pixel_values([square]))


def test_a_name_that_begins_with_a_tilde_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("~nobody-by-this-name.png")
    assert load_image("~nobody-by-this-name.png").size == (4, 4)
