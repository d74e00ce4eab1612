"""Questions and answers in LLaVA's JSON, with or without pictures, and the same as chat messages."""

import re
from pathlib import Path
from typing import Any

from ..errors import DataError
from .broken import BrokenSample
from .records import Records, existing, field
from .sample import Sample

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_FIELDS = ("image", "image_path", "images")
MAX_TURNS = 8  # longer ones are cut to KEPT_TURNS, as in the reference
KEPT_TURNS = 6
_PLACEHOLDER = re.compile(r"<image>\n?")

Turns = tuple[tuple[str, str], ...]


class ConversationsDataset:
    """Records with "conversations", "messages", or (text only) "prompt" and "response"."""

    def __init__(self, file: Path, task: str, root: Path) -> None:
        """Raises DataError if the first record holds no conversation, or no picture where the task needs one."""
        self.name = str(file)
        self.task = task
        self._root = root
        self._records = Records(file)
        first = self._records.first
        if not any(name in first for name in ("conversations", "messages")) and not {"prompt", "response"} <= first.keys():
            raise DataError(f"{file}: the first record has the fields {', '.join(first) or '(none)'}. A conversation is in "
                            'conversations, messages, or prompt and response.')

    def __len__(self) -> int:
        return len(self._records)

    def sample(self, index: int) -> Sample:
        name, record = self._records.name(index), self._records.read(index)
        images = field(record, *IMAGE_FIELDS)
        images = [] if images is None else images if isinstance(images, list) else [images]
        if self.task == "text" and images:
            raise BrokenSample(name, "has a picture, which the task text has no use for; the task understand has")
        return conversation_sample(name, self.task, record, tuple(existing(self._root, image, name) for image in images))


def conversation_sample(name: str, task: str, record: dict[str, Any], images: tuple[Any, ...]) -> Sample:
    """The sample of one record and its pictures, for the tasks understand, text and text_to_image (what the user says is drawn)."""
    turns, placeholders = read_turns(name, record)
    if placeholders not in (0, len(images)):
        raise BrokenSample(name, f"has {placeholders} <image> for {len(images)} pictures")
    if task == "text_to_image":
        if len(images) != 1:
            raise BrokenSample(name, f"has {len(images)} pictures; exactly one is drawn")
        text = next((text for role, text in turns if role == "user" and text), "")
        if not text:
            raise BrokenSample(name, "the user says nothing that could be drawn")
        return Sample(name, task, text=text, target=images[0])
    turns = answered(name, turns)
    if task == "understand" and not images:
        raise BrokenSample(name, "has no picture; the task text learns from conversations without")
    return Sample(name, task, turns=turns, images=images)


def read_turns(name: str, record: dict[str, Any]) -> tuple[list[tuple[str, str]], int]:
    """(role, text) of all turns without their <image>, and how many there were. Raises BrokenSample for anything else."""
    turns = field(record, "conversations", "messages")
    if turns is None and {"prompt", "response"} <= record.keys():
        turns = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": record["response"]}]
    if not isinstance(turns, list) or not turns:
        raise BrokenSample(name, "has no list of turns in conversations or messages")
    read, placeholders = [], 0
    for number, turn in enumerate(turns, 1):
        role = field(turn, "from", "role") if isinstance(turn, dict) else None
        text = field(turn, "value", "content") if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise BrokenSample(name, f"turn {number} has no role ({', '.join(ROLES)}) in from or role, or no text in value or content")
        if role == "system" and number > 1:
            raise BrokenSample(name, f"turn {number} is a system turn; only the first may be one")
        placeholders += text.count("<image>")
        read.append((ROLES[role], _PLACEHOLDER.sub("", text).strip()))
    return read, placeholders


def answered(name: str, turns: list[tuple[str, str]]) -> Turns:
    """Turns cut to the length of the reference, alternating, the last one an answer."""
    system = [turn for turn in turns[:1] if turn[0] == "system"]
    talk = turns[len(system) :]
    talk = talk[:KEPT_TURNS] if len(talk) > MAX_TURNS else talk
    for number, (role, _) in enumerate(talk):
        if role != ("user", "assistant")[number % 2]:
            raise BrokenSample(name, f"turn {number + len(system) + 1} is of the {role}; user and assistant take turns, the user begins")
    if len(talk) % 2:
        talk = talk[:-1]
    if not talk:
        raise BrokenSample(name, "has no answer to learn from")
    if not all(text for role, text in talk if role == "assistant"):
        raise BrokenSample(name, "has an empty answer")
    return (*system, *talk)
