"""Pictures of the shipped workflows for the template browser, drawn by nano: `python -m tests.nodes.thumbnails` (a minute).

What each shows is what its workflow does, with the settings it ships. SANA has no small model: its picture shows what it is given.
"""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from blip3o_core import Blip3oPipeline
from blip3o_core.shapes.world import Object, Scene, render
from blip3o_core.variants.blip3o import NANO_FOLDER

from .schemas import REPOSITORY

SIDE, GAP, QUALITY = 512, 6, 88
PROMPT = "a red circle left of a blue square"
HEARTS = REPOSITORY / "tests" / "data" / "nano" / "hearts.safetensors"
TWO = Scene((Object("circle", "red", "large", (0.3, 0.4)), Object("square", "blue", "large", (0.7, 0.6))), "white")
APART = Scene((Object("circle", "red", "large", (0.25, 0.28)), Object("square", "blue", "large", (0.75, 0.72))), "white")
ONE = Scene((Object("triangle", "green", "large", (0.5, 0.5)),), "grey")


def grid(pictures: Sequence[Image.Image]) -> Image.Image:
    """Two by two."""
    canvas, side = Image.new("RGB", (SIDE, SIDE), "white"), (SIDE - GAP) // 2
    for index, picture in enumerate(pictures):
        small = picture.resize((side, side), Image.Resampling.LANCZOS)
        canvas.paste(small, (index % 2 * (side + GAP), index // 2 * (side + GAP)))
    return canvas


def with_text(picture: Image.Image, lines: Sequence[str]) -> Image.Image:
    """The picture above, what was said below."""
    canvas, side = Image.new("RGB", (SIDE, SIDE), "white"), SIDE * 5 // 8
    canvas.paste(picture.resize((side, side), Image.Resampling.LANCZOS), ((SIDE - side) // 2, 0))
    text = "\n".join("\n".join(textwrap.wrap(line, 46)) for line in lines)
    ImageDraw.Draw(canvas).multiline_text((16, side + 12), text, fill="black", font=ImageFont.load_default(20), spacing=6)
    return canvas


def thumbnails(pipe: Blip3oPipeline, hearts: Blip3oPipeline) -> dict[str, Image.Image]:
    """Name of the workflow -> its picture."""
    two, apart, one = render(TWO), render(APART), render(ONE)
    chain = ["Make the background black", "Remove the blue square", "Add a yellow ring in the bottom right corner"]
    steps = [pipe.edit([apart], [chain[: count + 1]], seeds=[3])[0] for count in range(len(chain))]
    edited = pipe.edit([apart, one], ["Replace the circle with a star", "Replace the triangle with a circle"], seeds=[3, 3])
    question = "What is in the picture?"
    chat = pipe.chat()
    full = chat.say("Rewrite as a full prompt: yellow star, blue square, black background")
    [drawn] = pipe.generate([full], seeds=[7])
    return {
        "text_to_image": grid(pipe.generate(
            [PROMPT, "a large yellow star on a black background", "three green rings",
             "a purple triangle above an orange cross"], seeds=[7, 7, 7, 7])),
        "draw_and_ask": with_text(pipe.generate([PROMPT], seeds=[7])[0], [PROMPT]),
        "text_to_image_lora": grid(hearts.generate(
            [f"a {colour} heart on a {ground} background" for colour, ground in
             (("red", "white"), ("yellow", "black"), ("blue", "grey"), ("green", "white"))], seeds=[7, 7, 7, 7])),
        "image_editing": grid([apart, edited[0], one, edited[1]]),
        "iterative_editing": grid([apart, *steps]),
        "image_understanding": with_text(two, [f"> {question}", pipe.ask(question, [two])]),
        "multi_turn_chat": with_text(drawn, [f"> {question}", pipe.ask(question, [drawn])]),
        "reconstruction": grid([two, *pipe.reconstruct([two], seeds=[0]), one, *pipe.reconstruct([one], seeds=[0])]),
        "reconstruction_sana": with_text(two, ["picture -> SigLIP2 -> SANA -> picture"]),
        "variations_and_mixing": grid([two, *pipe.vary([two], seeds=[1, 2, 3], strength=0.6)]),
    }  # fmt: skip


def main() -> None:
    pipe = Blip3oPipeline.from_pretrained(NANO_FOLDER, device="cpu")
    hearts = Blip3oPipeline.from_pretrained(NANO_FOLDER, device="cpu", loras=[(HEARTS, 1.0)])
    for name, picture in thumbnails(pipe, hearts).items():
        picture.save(REPOSITORY / "workflows" / f"{name}.jpg", quality=QUALITY, optimize=True)


if __name__ == "__main__":
    main()
