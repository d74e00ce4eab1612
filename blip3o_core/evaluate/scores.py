"""Results -> shares of right ones per category, how much seeds differ, a table, and a sheet with right and wrong marked."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from PIL import Image

from ..sheets import contact_sheet
from .items import Drawn, Result

RIGHT, WRONG, UNJUDGED = (40, 150, 70), (210, 40, 40), (150, 150, 150)
WORST_REASONS = 5


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """group -> {"score": mean of its categories, "categories": {category: {"score", "right", "of"}}}, and "diversity".

    GenEval's overall score is the mean of the categories too, not of the pictures.
    """
    counts: dict[str, dict[str, list[bool]]] = {}
    for result in results:
        if result.verdict is not None:
            counts.setdefault(result.item.group, {}).setdefault(result.item.category, []).append(result.verdict.right)
    groups: dict[str, Any] = {}
    for group, categories in counts.items():
        table = {name: {"score": sum(right) / len(right), "right": sum(right), "of": len(right)} for name, right in categories.items()}
        groups[group] = {"score": sum(row["score"] for row in table.values()) / len(table), "categories": table}
    spread = diversity([result for result in results if isinstance(result, Drawn)])
    return groups if spread is None else {**groups, "diversity": spread}


def diversity(drawn: Sequence[Drawn]) -> float | None:
    """Root mean square difference in 0..1 between pictures of one prompt with different seeds; None without such pairs.

    Only prompts count: an edit or a reconstruction has one right result.
    """
    by_item: dict[int, list[np.ndarray]] = {}
    for result in drawn:
        if result.item.source is None:
            pixels = np.asarray(result.picture.convert("RGB"), np.float32) / 255
            by_item.setdefault(id(result.item), []).append(pixels)
    differences = [float(np.sqrt(np.square(one - other).mean())) for own in by_item.values() for one, other in combinations(own, 2)]
    return sum(differences) / len(differences) if differences else None


def table(scores: dict[str, Any]) -> str:
    """For a terminal."""
    lines = []
    for group, values in scores.items():
        if not isinstance(values, dict):
            continue
        lines.append(f"{group:<28}{values['score']:>8.3f}")
        if len(values["categories"]) > 1:
            lines += [f"  {name.replace('_', ' '):<26}{row['score']:>8.3f}{row['right']:>7} of {row['of']}"
                      for name, row in values["categories"].items()]  # fmt: skip
    if "diversity" in scores:
        lines.append(f"{'difference between seeds':<28}{scores['diversity']:>8.3f}")
    return "\n".join(lines)


def common_faults(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """group -> the most frequent reasons of wrong results."""
    reasons: dict[str, Counter] = {}
    for result in results:
        if result.verdict is not None and not result.verdict.right:
            reasons.setdefault(result.item.group, Counter())[result.verdict.reason] += 1
    return {group: dict(counter.most_common(WORST_REASONS)) for group, counter in reasons.items()}


def sheet(drawn: Sequence[Drawn], *, title: str, columns: int | None = None) -> Image.Image:
    """Pictures with their text; green frames are right, red ones wrong. Edits and reconstructions stand beside their source."""
    pictures = [result.picture if result.item.source is None else _beside(result.item.source, result.picture) for result in drawn]
    labels = [_label(result) for result in drawn]
    frames = [UNJUDGED if result.verdict is None else RIGHT if result.verdict.right else WRONG for result in drawn]
    return contact_sheet(pictures, labels, columns=columns, title=title, frames=frames)


def _label(result: Drawn) -> str:
    text = result.item.text or "the same again"
    return text if result.verdict is None or result.verdict.right else f"{text} [{result.verdict.reason}]"


def _beside(source: Image.Image, picture: Image.Image) -> Image.Image:
    source = source.resize(picture.size)
    both = Image.new("RGB", (2 * picture.width + 4, picture.height), "white")
    both.paste(source, (0, 0))
    both.paste(picture, (picture.width + 4, 0))
    return both
