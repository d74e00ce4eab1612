"""Sheets of sample pictures."""

import pytest
from PIL import Image, ImageChops, ImageFont

from blip3o_core.errors import OutputError
from blip3o_core.sheets import MARGIN, NARROWEST, PAPER, _wrap, contact_sheet
from blip3o_core.train.pictures import save_sheet

COLOURS = ["red", "lime", "blue", "yellow", "magenta", "cyan", "orange", "purple"]


def squares(count: int, size: tuple[int, int] = (200, 200)) -> list[Image.Image]:
    return [Image.new("RGB", size, COLOURS[index]) for index in range(count)]


def found(sheet: Image.Image, colour: str) -> tuple[int, int, int, int]:
    """Box of the pixels that have this very colour."""
    difference = ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour)).convert("L")
    return difference.point(lambda value: 255 if value == 0 else 0).getbbox()


@pytest.mark.parametrize(("count", "columns", "shape"), [(1, None, (1, 1)), (4, None, (4, 1)), (8, None, (4, 2)), (6, None, (3, 2)),
                                                         (8, 2, (2, 4)), (2, 5, (2, 1))])  # fmt: skip
def test_pictures_stand_in_reading_order_whole_and_unchanged(count, columns, shape):
    sheet = contact_sheet(squares(count), ["a"] * count, columns=columns, title="step 1")
    boxes = [found(sheet, colour) for colour in COLOURS[:count]]
    assert [(right - left, bottom - top) for left, top, right, bottom in boxes] == [(200, 200)] * count
    lefts, tops = sorted({box[0] for box in boxes}), sorted({box[1] for box in boxes})
    assert (len(lefts), len(tops)) == shape
    assert all(right - left == 200 + MARGIN for left, right in zip(lefts, lefts[1:], strict=False))
    assert all(lower - upper > 200 + 2 * MARGIN for upper, lower in zip(tops, tops[1:], strict=False)), "room for the label"
    assert [(box[1], box[0]) for box in boxes] == sorted((box[1], box[0]) for box in boxes)


def test_pictures_of_other_modes_and_sizes_fit_into_equal_cells():
    pictures = [Image.new("RGBA", (1024, 2048), "red"), Image.new("L", (16, 16), 0), Image.new("P", (300, 100))]
    sheet = contact_sheet(pictures, ["tall", "tiny", "wide"], columns=3, title="")
    left, top, right, bottom = found(sheet, "red")
    assert (right - left, bottom - top) == (256, 512), "large pictures are shrunk, their shape kept"
    assert sheet.width == 3 * (300 + MARGIN) + MARGIN


@pytest.mark.parametrize("label", ["一只红色的狐狸在雪中", "лиса 🦊 🧑\u200d🚀", "שלום עולם", "a\x00b\n\n\tc\u202e", "\udcff\ud800", ""])
def test_any_text_can_be_a_label_or_title(label):
    assert contact_sheet(squares(1), [label], columns=None, title=label).width == 200 + 2 * MARGIN


@pytest.mark.parametrize("text", ["a fox in the snow " * 40, "x" * 5000, "狐" * 3000, "short " + "y" * 300])
def test_long_labels_are_wrapped_into_the_cell_and_cut(text):
    font = ImageFont.load_default(13)
    lines = _wrap(text, font, NARROWEST, 3)
    assert len(lines) == 3
    assert all(font.getlength(line) <= NARROWEST for line in lines)
    assert lines[-1].endswith("...")
    assert text.startswith(lines[0])


def test_short_labels_are_kept_and_break_at_spaces():
    font = ImageFont.load_default(13)
    assert _wrap("a fox", font, NARROWEST, 3) == ["a fox"]
    text = "an oil painting of a harbour at dusk with boats"
    lines = _wrap(text, font, NARROWEST, 3)
    assert len(lines) > 1 and " ".join(lines) == text


def test_labels_are_drawn_below_their_picture():
    def ink(label: str) -> int:
        sheet = contact_sheet(squares(1), [label], columns=1, title="")
        _, _, _, bottom = found(sheet, "red")
        below = sheet.crop((0, bottom, *sheet.size))
        box = ImageChops.difference(below, Image.new("RGB", below.size, PAPER)).getbbox()
        return 0 if box is None else box[2] - box[0]

    assert ink("") == 0 < ink("a fox") < ink("a fox in the snow")


def test_sheets_are_saved_by_step_and_replace_each_other(tmp_path):
    path = save_sheet(tmp_path, 200, squares(1)[0])
    assert save_sheet(tmp_path, 200, squares(2)[1]) == path == tmp_path / "samples" / "step_00000200.png"
    assert Image.open(path).getpixel((0, 0)) == (0, 255, 0)
    assert [file.name for file in path.parent.iterdir()] == ["step_00000200.png"]


def test_a_sheet_that_cannot_be_saved_is_an_output_error(tmp_path):
    (tmp_path / "samples").write_text("in the way")
    with pytest.raises(OutputError, match="samples: can't write there"):
        save_sheet(tmp_path, 1, squares(1)[0])
