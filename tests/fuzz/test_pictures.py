"""Picture files and tensors: damaged, of odd modes and sides, and small files that claim to be enormous."""

import io
import struct
import zlib

import pytest
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from blip3o_core.images import MAX_PIXELS

from .conftest import MAX_GROWTH
from .damage import byte_changes, damaged

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM", "TGA", "PCX", "JPEG2000", "AVIF", "DDS", "SGI", "DIB", "ICNS", "MSP",
           "XBM", "IM")  # fmt: skip
MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F")
SIDES = st.one_of(st.integers(1, 80), st.sampled_from([1, 2, 3, 199, 201, 2000]))


def encoded(kind: str, mode: str, width: int, height: int, **options) -> bytes | None:
    """A picture file, or nothing where this format can't hold it or this Pillow can't write it."""
    stream = io.BytesIO()
    try:
        source = Image.radial_gradient("L").resize((width, height))
        (source.convert("RGB").convert(mode) if mode not in ("La", "RGBa", "I;16", "LAB", "PA") else Image.new(mode, (width, height))).save(
            stream, kind, **options)  # fmt: skip
    except (OSError, ValueError, KeyError, SystemError, struct.error):
        return None
    return stream.getvalue()


def test_bytes_of_a_picture(fuzz, worker, tmp_path):
    def check(kind, mode, width, height, changes):
        whole = encoded(kind, mode, width, height) or encoded(kind, "RGB", 20, 20) or encoded("PNG", "RGB", 20, 20)
        (tmp_path / "it.png").write_bytes(damaged(whole, changes))
        return worker(fuzz, "picture", path=str(tmp_path / "it.png"))

    fuzz(check, ci=48, nightly=400, kind=st.sampled_from(FORMATS), mode=st.sampled_from(MODES), width=SIDES, height=SIDES,
         changes=st.one_of(st.just([]), byte_changes()))  # fmt: skip


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: int, extra: bytes = b"") -> bytes:
    """A PNG that says what it likes; zeros for some rows follow, very well compressed."""
    row = 1 + min(width, 10**6)
    pixels = zlib.compress(bytes(min(row * rows, 5 * 10**6)), 9)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)) + extra
            + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))  # fmt: skip


BOMB = zlib.compress(bytes(60 * 10**6), 9)
"""60 MB in 60 kB."""
EXTRAS = {
    "none": b"", "text": chunk(b"zTXt", b"Comment\0\0" + BOMB), "international": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + BOMB),
    "profile": chunk(b"iCCP", b"ICC\0\0" + BOMB), "palette": chunk(b"PLTE", bytes(768)), "transparency": chunk(b"tRNS", bytes(256)),
    "exif": chunk(b"eXIf", b"MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03\0\0\0\1\0\6\0\0" * 500), "gamma": chunk(b"gAMA", bytes(4)),
    "animation": chunk(b"acTL", struct.pack(">II", 2**31, 0)), "many": chunk(b"tEXt", b"a\0b") * 20_000,
}  # fmt: skip
BYTES_PER_PIXEL = 12
"""What Pillow decodes, RGB of 4 bytes, and the same turned upright."""
CLAIMS = st.one_of(st.integers(0, 300), st.sampled_from([0, 1, 20_000, 65_535, 10**6, 2**31 - 1, 2**32 - 1]))


def test_pictures_that_claim_to_be_enormous(fuzz, worker, tmp_path):
    def check(width, height, depth, colour, rows, extra):
        (tmp_path / "it.png").write_bytes(png(width, height, depth, colour, rows, EXTRAS[extra]))
        allowed = BYTES_PER_PIXEL * min(width * height, MAX_PIXELS) + MAX_GROWTH // 2
        return worker(fuzz, "picture", path=str(tmp_path / "it.png"), allowed_bytes=allowed)

    fuzz(check, ci=24, nightly=200, width=CLAIMS, height=CLAIMS, depth=st.sampled_from([1, 2, 4, 8, 16, 3]),
         colour=st.sampled_from([0, 2, 3, 4, 6, 5]), rows=st.integers(0, 50), extra=st.sampled_from(list(EXTRAS)))  # fmt: skip


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "TGA", "PPM", "JPEG", "WEBP", "ICO"])
def test_a_header_with_other_sides(worker, fuzz_once, tmp_path, kind):
    """The two places where a format says its sides become the largest number that fits."""
    whole = encoded(kind, "RGB", 20, 20)
    for value, form in ((20, "<H"), (20, "<I"), (20, ">H"), (20, ">I")):
        wanted = struct.pack(form, value)
        huge = whole.replace(wanted, b"\x7f" + b"\xff" * (len(wanted) - 1), 2)
        (tmp_path / "it.png").write_bytes(huge.replace(b"20 20", b"999999 999999"))
        assert worker(fuzz_once, "picture", path=str(tmp_path / "it.png")) in ("accepted", "refused")


def test_metadata_of_a_picture_is_passed_over(worker, fuzz_once, tmp_path):
    """Texts that a program might take for more: a workflow, a recipe, code; none of them is read."""
    texts = PngImagePlugin.PngInfo()
    for key in ("workflow", "prompt", "blip3o", "parameters"):
        texts.add_itxt(key, '{"1": {"class_type": "__import__", "inputs": {"path": "../../etc/passwd"}}}' * 1000)
    Image.new("RGB", (20, 20)).save(tmp_path / "it.png", pnginfo=texts)
    assert worker(fuzz_once, "picture", path=str(tmp_path / "it.png")) == "accepted"


SHAPES = st.one_of(
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 33]), max_size=5),
    st.builds(lambda *shape: [1, *shape], st.integers(1, 60), st.integers(1, 60), st.sampled_from([1, 3, 4])),
    st.sampled_from([[1, 1, 5000, 3], [3, 5000, 1], [200, 2, 2, 3]]),
)  # fmt: skip
DTYPES = ("float32", "float16", "bfloat16", "float64", "uint8", "int64", "bool", "complex64", "float8_e4m3fn")
FILLS = st.lists(st.one_of(st.floats(0, 1), st.sampled_from([-0.6, 1.6, 255.0, 1e38, float("nan"), float("inf"), -1e-30])),
                 min_size=1, max_size=4)  # fmt: skip


def test_tensors_as_pictures(fuzz, worker):
    def check(shape, dtype, values, channels_last):
        return worker(fuzz, "tensor", shape=shape, dtype=dtype, values=values, channels_last=channels_last)

    fuzz(check, ci=32, nightly=250, shape=SHAPES, dtype=st.sampled_from(DTYPES), values=FILLS,
         channels_last=st.sampled_from([None, True, False]))  # fmt: skip


def test_the_usual_formats_are_among_the_damaged_ones():
    made = {kind for kind in FORMATS if encoded(kind, "RGB", 20, 20)}
    assert {"PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM"} <= made
