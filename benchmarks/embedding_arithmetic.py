"""Draws docs/embedding_arithmetic.png: photographs, and colour maps of what lies between their embeddings.

    python benchmarks/embedding_arithmetic.py
"""

from pathlib import Path

import torch
from PIL import Image, ImageDraw
from skimage import data

from blip3o_core import Blip3oPipeline
from blip3o_core.embeddings import add_difference, interpolate
from blip3o_core.preview import principal_component_map

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tests" / "data" / "sdxl"
SIDE, GAP, LINE = 150, 10, 18


def main() -> None:
    pipe = Blip3oPipeline.from_pretrained(TINY / "checkpoint", device="cpu", dtype=torch.float32,
                                          vision_encoder=TINY / "eva_clip_vision_tower")  # fmt: skip
    a, b = (Image.fromarray(picture) for picture in (data.astronaut(), data.coffee()))
    turned = a.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    za, zb, zt = pipe.embed_image([a, b, turned])[:, None]
    rows = [
        [("a", a), *((f"interpolate {w:g}", interpolate(za, zb, w)) for w in (0, 0.25, 0.5, 0.75, 1)), ("b", b)],
        [("a, turned", turned), ("its embedding", zt), ("b + (turned - a)", add_difference(zb, zt, za))],
    ]  # fmt: skip
    sheet = Image.new("RGB", (GAP + 7 * (SIDE + GAP), len(rows) * (SIDE + LINE + GAP) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (title, item) in enumerate(row):
            corner = (GAP + x * (SIDE + GAP), GAP + y * (SIDE + LINE + GAP))
            sheet.paste(picture(item).resize((SIDE, SIDE)), corner)
            draw.text((corner[0], corner[1] + SIDE + 3), title, fill="black")
    sheet.save(ROOT / "docs" / "embedding_arithmetic.png", optimize=True)


def picture(item: Image.Image | torch.Tensor) -> Image.Image:
    if isinstance(item, Image.Image):
        side = min(item.size)
        left, top = (item.width - side) // 2, (item.height - side) // 2
        return item.crop((left, top, left + side, top + side))
    colours = ((principal_component_map(item)[0] + 1) / 2 * 255).round().to(torch.uint8)
    return Image.fromarray(colours.movedim(0, -1).contiguous().numpy())


if __name__ == "__main__":
    main()
