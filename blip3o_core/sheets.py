"""Pictures on one labelled sheet."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LARGEST = 512  # pixels of a picture's longer side on the sheet; larger ones are shrunk
NARROWEST = 192  # of a cell, so that a label is readable below a tiny picture
MARGIN = 12
LABEL_LINES = 3
FRAME = 4
INK, PAPER, FAINT = (24, 26, 31), (255, 255, 255), (226, 229, 234)


def contact_sheet(
    pictures: Sequence[Image.Image], labels: Sequence[str], *, columns: int | None = None, title: str,
    frames: Sequence[tuple[int, int, int]] | None = None,
) -> Image.Image:  # fmt: skip
    """Pictures of any sizes in rows, each above its label, which is wrapped and cut; RGB.

    Args:
        columns: None for a shape that leaves few cells empty. Letters that Pillow's own font lacks are drawn as boxes.
        frames: a colour around each picture.
    """
    assert pictures and len(pictures) == len(labels), f"{len(pictures)} pictures, {len(labels)} labels"
    pictures = [_fitted(picture) for picture in pictures]
    columns = min(columns or _columns(len(pictures)), len(pictures))
    rows = math.ceil(len(pictures) / columns)
    width = max(NARROWEST, *(picture.width for picture in pictures))
    height = max(picture.height for picture in pictures)
    size = max(13, round(width / 20))
    font, title_font = ImageFont.load_default(size), ImageFont.load_default(round(size * 1.3))
    sheet_width = columns * (width + MARGIN) + MARGIN
    wrapped = [_wrap(label, font, width, LABEL_LINES) for label in labels]
    line_height = round(size * 1.3)
    label_height = max(map(len, wrapped)) * line_height
    top = MARGIN + round(size * 2) if title else MARGIN
    row_height = height + MARGIN // 2 + label_height + MARGIN
    sheet = Image.new("RGB", (sheet_width, top + rows * row_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    for line in _wrap(title, title_font, sheet_width - 2 * MARGIN, 1):
        draw.text((MARGIN, MARGIN), line, fill=INK, font=title_font)
    for index, (picture, lines) in enumerate(zip(pictures, wrapped, strict=True)):
        x = MARGIN + index % columns * (width + MARGIN)
        y = top + index // columns * row_height
        draw.rectangle((x, y, x + width - 1, y + height - 1), fill=FAINT)
        if frames is not None:
            draw.rectangle((x - FRAME, y - FRAME, x + width - 1 + FRAME, y + height - 1 + FRAME), outline=frames[index], width=FRAME)
        sheet.paste(picture, (x + (width - picture.width) // 2, y + (height - picture.height) // 2))
        for number, line in enumerate(lines):
            draw.text((x, y + height + MARGIN // 2 + number * line_height), line, fill=INK, font=font)
    return sheet


def _columns(count: int) -> int:
    if count <= 4:
        return count
    near_square = math.ceil(math.sqrt(count))
    return min((near_square, near_square + 1), key=lambda columns: -count % columns)  # cells left empty


def _fitted(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGB")
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return picture


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Lines no wider than `width`, broken at spaces where there are any; what is left after `most` lines becomes an ellipsis."""
    rest = " ".join(text.split())[:1000]
    lines: list[str] = []
    while rest and len(lines) < most:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > width:
            end -= 1 if end < 200 else end // 4
        space = rest.rfind(" ", 0, end + 1)
        if end < len(rest) and space > 0:
            end = space
        lines.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines[-1] = last.rstrip() + "..."
    return lines
