"""Right or wrong, and why: drawn pictures against facts, edits and originals, and answers against what is true.

Pictures come as the Scene that detector.detect finds in them, so that a judgement can be tested on scenes alone.
"""

import itertools
import math
import re
from collections import Counter
from dataclasses import dataclass

from .edits import Edit
from .facts import Facts, Wanted, fault
from .questions import Question
from .world import COLOURS, PLACES, ROUGHLY, SHAPES, Object, Scene, closeness, is_in_place

POSITION_TOLERANCE = 0.08  # of the picture's side, for what should stay where it was

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_SAME = {
    "gray": "grey", "center": "centre", "middle": "centre", "central": "centre", "upper": "top", "lower": "bottom", "under": "below",
    "beneath": "below", "underneath": "below", "over": "above", "circles": "circle", "squares": "square", "triangles": "triangle",
    "stars": "star", "rings": "ring", "crosses": "cross", "violet": "purple", "yeah": "yes", "nope": "no", "none": "0", "no": "no",
    "single": "1", **{name: str(number) for number, name in enumerate(_NUMBERS)},
}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    right: bool
    reason: str  # what is wrong; empty if nothing is


def judge_prompt(facts: Facts, drawn: Scene) -> Verdict:
    """Exactly the objects of the facts, each with everything that was said, and nothing else."""
    return _verdict(fault(facts, drawn))


def judge_reconstruction(original: Scene, drawn: Scene) -> Verdict:
    """The same objects at the same places on the same background."""
    return _verdict(_difference(original, drawn))


def judge_edit(edit: Edit, drawn: Scene) -> Verdict:
    """What was asked for is done, and everything else is as it was."""
    if _verdict(_difference(edit.source, drawn)).right:
        return Verdict(False, "nothing was changed")
    return _verdict(_difference(edit.target, drawn, edit))


def judge_answer(question: Question, answer: str) -> Verdict:
    """Whatever its wording, the answer must say what the right one says, and nothing that contradicts it."""
    said, true = _meaning(question, answer), _meaning(question, question.answer)
    return Verdict(said == true, "" if said == true else f"{answer!r}, not {question.answer!r}")


def _verdict(reason: str) -> Verdict:
    return Verdict(not reason, reason)


def _difference(expected: Scene, drawn: Scene, edit: Edit | None = None) -> str:
    """Between the scenes, under the pairing of their objects with the fewest differences; an edit leaves its subject some freedom."""
    if drawn.background != expected.background:
        return f"the background is {drawn.background}, not {expected.background}"
    if len(drawn.objects) != len(expected.objects):
        return f"{len(drawn.objects)} objects, not {len(expected.objects)}"
    candidates = (_faults(expected.objects, order, edit) for order in itertools.permutations(drawn.objects))
    return "; ".join(min(candidates, key=len, default=[]))


def _faults(expected: tuple[Object, ...], drawn: tuple[Object, ...], edit: Edit | None) -> list[str]:
    found = []
    for index, (thing, actual) in enumerate(zip(expected, drawn, strict=True)):
        free = edit is not None and index == edit.subject
        said = edit.said if free else Wanted(thing.shape, thing.colour, thing.size)
        for name in ("shape", "colour", "size"):
            asked, seen = getattr(said, name), getattr(actual, name)
            if asked not in (None, seen):
                found.append(f"the {name} of the {thing.colour} {thing.shape} is {seen}, not {asked}")
        if free and not edit.stays:
            if said.place and not is_in_place(actual, said.place):
                found.append(f"the {thing.colour} {thing.shape} is not in the place {said.place}")
            if edit.relation and closeness(actual, edit.relation[0], drawn[edit.relation[1]]) < ROUGHLY:
                found.append(f"the {thing.colour} {thing.shape} is not {edit.relation[0]} the {expected[edit.relation[1]].shape}")
        elif math.dist(thing.centre, actual.centre) > POSITION_TOLERANCE:
            found.append(f"the {thing.colour} {thing.shape} has moved")
    return found


def _meaning(question: Question, answer: str) -> object:
    """What the answer says, in a form that equals that of every answer with the same meaning."""
    text = answer.lower().replace("-", " ").replace("light blue", "sky").replace("sky blue", "sky")
    words = [_SAME.get(word, word) for word in re.findall(r"[a-z]+|\d+", text)]
    if question.kind == "yes_no":
        return words[0] if words and words[0] in ("yes", "no") else None
    if question.kind == "colour":
        return {word for word in words if word in COLOURS or word == "sky"}
    if question.kind == "background":
        return {word for word in words if word in COLOURS or word in ("grey", "sky")}
    if question.kind == "shape":
        return {word for word in words if word in SHAPES}
    if question.kind == "count":
        numbers = {word for word in words if word.isdigit()}
        numbers = numbers or ({"0"} if "no" in words[:-1] else set())  # no circles; a mere no is no number
        return numbers if len(numbers) == 1 else None
    if question.kind == "where":
        return _position(words, question.answer)
    assert question.kind == "list", question
    return _listed(words)


def _position(words: list[str], true_answer: str) -> object:
    """(relation, object) if the right answer is relative to an object, else the place."""
    directions = [word for word in words if word in ("left", "right", "above", "below")]
    if any(f"{relation} the " in true_answer for relation in ("left of", "right of", "above", "below")):
        return tuple(directions)
    found = {word for word in words if word in ("top", "bottom", "left", "right", "centre")}
    found -= {"centre"} if len(found) > 1 else set()  # at the top in the middle
    return found if any(set(place.split()) == found for place in PLACES) else None


def _listed(words: list[str]) -> Counter | None:
    """How many of each colour and shape; None for a shape that has no colour."""
    found: Counter = Counter()
    count, colour = 1, None
    for word in words:
        if word.isdigit():
            count = int(word)
        elif word in ("a", "an"):
            count = 1
        elif word in COLOURS:
            colour = word
        elif word in SHAPES:
            if colour is None:
                return None
            found[colour, word] += count
            count, colour = 1, None
    return found
