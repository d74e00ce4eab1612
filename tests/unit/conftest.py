"""The command in this process, and pictures as users have them."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from blip3o_core.cli.main import main


class Result(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(capsys, monkeypatch, tiny_checkpoint) -> Callable[..., Result]:
    """cli("ask", "Why?", ...): runs the command on the tiny checkpoint, without a new process."""
    monkeypatch.setenv("BLIP3O_MODEL", str(tiny_checkpoint))
    capsys.readouterr()

    def run(*args: object) -> Result:
        code = main([*map(str, args), "--device", "cpu"])
        return Result(code, *capsys.readouterr())

    return run


ODD_PICTURES = ("1x1.png", "rgba.png", "grey.png", "16-bit.png", "cmyk.jpg", "rotated.jpg", "animated.gif")
BROKEN_PICTURES = {
    "truncated.png": "the picture is damaged or cut off",
    "truncated.jpg": "the picture is damaged or cut off",
    "text.png": "not a picture in a format that can be read here",
    "empty.png": "not a picture in a format that can be read here",
    "missing.png": "there is no such file",
    "folder.png": "a folder, not a picture",
}


@pytest.fixture(scope="session")
def photograph() -> Image.Image:
    """60 x 40: a gradient with a bright corner, so that every turn of it differs."""
    rows, columns = np.mgrid[:40, :60]
    pixels = np.stack((rows * 6, columns * 4, (rows + columns) * 2), axis=-1).astype(np.uint8)
    pixels[:10, :20] = 255
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def odd_pictures(tmp_path_factory, photograph) -> Path:
    """A folder with all of ODD_PICTURES, which can be read, and thin.png (8000 x 3). Read-only."""
    folder = tmp_path_factory.mktemp("odd")
    transparent = photograph.convert("RGBA")
    transparent.putalpha(photograph.convert("L"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    Image.new("RGB", (1, 1), "red").save(folder / "1x1.png")
    Image.new("RGB", (8000, 3), "red").save(folder / "thin.png")
    transparent.save(folder / "rgba.png")
    photograph.convert("L").save(folder / "grey.png")
    Image.fromarray(np.asarray(photograph.convert("L")).astype(np.uint16) * 257).save(folder / "16-bit.png")
    photograph.convert("CMYK").save(folder / "cmyk.jpg")
    photograph.save(folder / "rotated.jpg", exif=exif, quality=95)
    photograph.save(folder / "animated.gif", save_all=True, append_images=[photograph.rotate(90), photograph.rotate(180)])
    return folder


@pytest.fixture(scope="session")
def broken_pictures(tmp_path_factory, photograph) -> Path:
    """A folder with all of BROKEN_PICTURES. Read-only."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("truncated.png", "truncated.jpg"):
        photograph.resize((300, 200)).save(folder / name)
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not a picture", "utf-8")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    return folder
