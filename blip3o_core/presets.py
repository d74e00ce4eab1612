"""Ready-made questions about pictures. Edit the texts here; the command line, the nodes and the library all read this file."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from .errors import InputError


class Preset(NamedTuple):
    """A question and the few words that a menu shows for it."""

    title: str
    question: str


PRESETS: Mapping[str, Preset] = MappingProxyType({
    "short_caption": Preset(
        "Short caption",
        "Describe this image in one short sentence. Name the main subject and what it is doing. Answer with the sentence only.",
    ),
    "detailed_caption": Preset(
        "Detailed caption",
        "Describe this image in detail: the subjects and what they look like, what they are doing, the place, the light and the "
        "colors, the composition and the style. Write one paragraph of plain sentences. Describe only what can be seen.",
    ),
    "tags": Preset(
        "Tags",
        "List tags for this image, the most important first: subject, attributes, action, place, light, colors, style, medium. "
        "Answer with 10 to 30 short lower-case tags, separated by commas, and nothing else.",
    ),
    "image_prompt": Preset(
        "Prompt for text-to-image",
        "Write a prompt with which a text-to-image model would draw this image again. Name subject, details, setting, light, "
        "colors, composition, camera or medium, and style. Answer with the prompt only, in at most 80 words.",
    ),
    "ocr": Preset(
        "Read text (OCR)",
        "Read all text in this image, in reading order. Keep its line breaks, spelling and language. Answer with the text only; "
        "if there is none, answer: no text.",
    ),
    "chart_to_table": Preset(
        "Chart to table",
        "Convert the chart in this image to a Markdown table: one column for the labels and one for each series, with units in the "
        "header. Write the numbers as precisely as they can be read. Answer with the table only.",
    ),
    "count": Preset(
        "Count objects",
        "Count the objects in this image. Answer with one line for each kind of object, in the form: name: number.",
    ),
    "reasoning": Preset(
        "Step-by-step reasoning",
        "Look at this image carefully and think step by step. First list what matters in it, then reason from that, then give the "
        "conclusion on a last line that starts with \"Answer:\".",
    ),
    "json": Preset(
        "JSON answer",
        "Describe this image as one JSON object with the keys \"caption\" (one sentence), \"objects\" (a list of objects with "
        "\"name\" and \"count\"), \"text\" (a list of strings that can be read), \"colors\" (a list) and \"style\" (a string). "
        "Answer with valid JSON only.",
    ),
})  # fmt: skip


def find_preset(name: str) -> Preset:
    """Raises InputError for an unknown name, with the nearest one."""
    if name in PRESETS:
        return PRESETS[name]
    nearest = difflib.get_close_matches(name.lower().replace("-", "_"), PRESETS, n=1, cutoff=0.5)
    hint = f"Did you mean {nearest[0]}?" if nearest else ""
    raise InputError(f"there is no preset {name!r:.60}. {hint + ' ' if hint else ''}Presets are: {', '.join(PRESETS)}.")


def build_question(preset: str | None, question: str | None) -> str:
    """The preset's text, the question, or the preset's text followed by the question, which may narrow or extend it.

    Raises: InputError if there is neither, or the question is only spaces.
    """
    if question is not None and not question.strip():
        raise InputError("the question is empty. Ask something about the image, or give an instruction.")
    parts = [*([find_preset(preset).question] if preset is not None else []), *([question] if question is not None else [])]
    if not parts:
        raise InputError("no question was given. Write one in quotes, or take a ready-made one: a preset.")
    return "\n".join(parts)
