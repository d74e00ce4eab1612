"""What pictures and LoRA files say about themselves is shown as text, or not at all; it decides nothing and is not passed on."""

import json
from dataclasses import replace

import pytest
from PIL import Image, PngImagePlugin

from blip3o_core.cli.drawing import save_png
from blip3o_core.cli.lora import as_text, describe
from blip3o_core.errors import InputError
from blip3o_core.images import load_image
from blip3o_core.lora.chosen import open_loras
from blip3o_core.lora.files import write_lora
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from ..unit.lora_samples import random_lora

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt.exe <script>alert(1)</script>"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\u202etxt.exe <script>alert(1)</script>"


@pytest.fixture
def file(tiny_checkpoint, tmp_path):
    """file(metadata) -> a LoRA file that says so."""
    lora = random_lora(Blip3oCheckpoint.open(tiny_checkpoint))

    def write(**metadata: str):
        write_lora(tmp_path / "it.safetensors", replace(lora, metadata={**lora.metadata, **metadata}))
        return tmp_path / "it.safetensors"

    return write


def test_lora_inspect_shows_no_control_characters(file):
    text = as_text(describe(file(note=HOSTILE, **{HOSTILE: "name"})))
    assert f"note = {SHOWN}" in text and f"{SHOWN} = name" in text
    assert not [letter for letter in text if not letter.isprintable() and letter != "\n"]


def test_errors_about_a_lora_show_none_either(file, tiny_checkpoint):
    path = file(**{"blip3o.base_model": HOSTILE, "blip3o.base_fingerprint": "\x1bc"})
    with pytest.raises(InputError, match="trained on") as caught:
        open_loras(Blip3oCheckpoint.open(tiny_checkpoint), [(path, 1.0)])
    assert SHOWN in str(caught.value) and "\x1b" not in str(caught.value)


def test_a_lora_names_no_file_that_is_opened(file, tiny_checkpoint, tmp_path):
    """Its base and its configuration are words, whatever they look like."""
    path = file(**{"blip3o.base_model": "/etc/passwd", "blip3o.config": json.dumps({"model": {"path": "/etc/passwd"}})})
    [opened] = open_loras(Blip3oCheckpoint.open(tiny_checkpoint), [(path, 1.0)])
    assert opened.label == "it.safetensors:1"


def test_a_picture_passes_nothing_on(tmp_path):
    """Texts, place, camera and profile of a source are gone from what is drawn after it; only the recipe is there."""
    exif = Image.Exif()
    exif[0x010E], exif[0x8825] = HOSTILE, {1: "N", 2: (52.0, 31.0, 0.0)}  # description, place
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("blip3o", '{"model": "/etc/passwd"}')
    texts.add_itxt("workflow", HOSTILE)
    Image.new("RGB", (20, 20)).save(tmp_path / "source.png", pnginfo=texts, exif=exif, icc_profile=b"profile")
    picture = load_image(tmp_path / "source.png")
    assert picture.info == {} and not picture.getexif()
    save_png(picture, tmp_path / "drawn.png", {"seed": 1})
    with Image.open(tmp_path / "drawn.png") as drawn:
        drawn.load()
        assert drawn.info == {"blip3o": '{"seed": 1}'} and not drawn.getexif()
