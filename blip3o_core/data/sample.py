"""One training sample as its dataset holds it: names and bytes, nothing decoded yet."""

from dataclasses import dataclass
from pathlib import Path

TASKS = ("text_to_image", "edit", "reconstruct", "understand", "text", "decode", "contrast", "autoencode", "segment")
"""What can be learned from a sample.

text_to_image: caption -> embedding of the picture. edit: picture and instruction -> embedding of the changed picture.
reconstruct: picture -> its own embedding, through the backbone. understand: pictures and a conversation about them -> its answers.
text: the same without pictures. For full training also: decode (embedding of a picture -> its pixels: trains the UNet), contrast
(picture and caption -> the same place: trains EVA-CLIP), autoencode (picture -> itself: trains the VAE), segment
(picture -> what each of its cells shows: trains vision tower, language model or EVA-CLIP).
"""

GENERATION_TASKS = ("text_to_image", "edit", "reconstruct")
WRITING_TASKS = ("understand", "text")
PICTURE_TASKS = ("reconstruct", "decode", "autoencode")  # need a picture and no text

ImageSource = Path | bytes
"""A file, or what one holds."""


@dataclass(frozen=True)
class Sample:
    """Fields that a task has no use for are empty."""

    name: str  # file, line or tar member, for messages
    task: str
    text: str = ""  # caption or instruction
    turns: tuple[tuple[str, str], ...] = ()  # (role "user" or "assistant", text), the last one an answer
    images: tuple[ImageSource, ...] = ()  # what the backbone sees
    target: ImageSource | None = None  # what is to be drawn; of the task segment a map of labels
    labels: ImageSource | None = None  # drawing tasks, if there is one: a map of labels of what is to be drawn
