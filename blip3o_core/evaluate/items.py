"""The parts of a benchmark, and its results."""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from ..shapes.judge import Verdict


@dataclass(frozen=True)
class DrawItem:
    """One picture to draw per seed: from a prompt, or from `source` by an instruction, or `source` again (text None)."""

    category: str
    text: str | None
    judge: Callable[[Image.Image], Verdict] | None = None  # None: judged by somebody else
    source: Image.Image | None = None
    group: str = "prompts"  # heading in the results: categories of one group are averaged


@dataclass(frozen=True)
class AskItem:
    """One question, about `source` if there is one."""

    category: str
    question: str
    judge: Callable[[str], Verdict]
    source: Image.Image | None = None
    group: str = "understanding"


@dataclass(frozen=True)
class Drawn:
    item: DrawItem
    seed: int
    picture: Image.Image
    verdict: Verdict | None


@dataclass(frozen=True)
class Answered:
    item: AskItem
    answer: str
    verdict: Verdict


Result = Drawn | Answered
