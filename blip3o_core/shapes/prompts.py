"""Text-to-image prompts, each with the facts that a judge checks: of GenEval's six categories, and mixed ones for training."""

from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from .facts import USUAL, Facts, Wanted, random_scene, realise, usual_scene, wanted
from .holdout import (
    SHAPE_COLOURS,
    SHAPE_COUNTS,
    SHAPE_PAIRS,
    SHAPE_RELATIONS,
    SHAPE_SIZE_BACKGROUNDS,
    held_out,
    held_out_facts,
    is_undrawn,
    is_undrawn_sight,
)
from .language import NUMBERS, amounts, on_background, phrase, plural, styled
from .world import (
    BACKGROUNDS,
    COLOURS,
    MAX_OBJECTS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZES,
    Scene,
    backgrounds_for,
    clear_relation,
    pick,
    place_of,
)

CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
HELD_OUT_KIND = dict(zip(CATEGORIES, ("sight", "pair", "count", "colour", "relation", "colour"), strict=True))
"""What of holdout.held_out makes a prompt of the category held out."""

MIXED = "mixed"
"""The category of prompts that join what the others keep apart; none of it is evaluated."""
_MIXED_OBJECTS = (1, 1, 2, 2, 2, 3)
_TRIES_PER_PROMPT = 50
_OPENINGS = ("{}", "{}", "{}", "a picture of {}", "an image of {}", "a photo of {}", "draw {}", "a picture that shows {}", "please draw {}",
             "an image with {}")  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    text: str
    category: str
    facts: Facts


def make_prompt(category: str, rng: np.random.Generator, *, held_out: bool = False) -> Prompt:
    """A random prompt that names a held-out combination of its category's kind and no other, or only what is drawn in training."""
    allowed = frozenset({HELD_OUT_KIND[category]} if held_out else ())
    while True:
        facts = _FACTS[category](rng, held_out)
        colours = [thing.colour for thing in facts.objects if thing.colour]
        possible = [name for name in backgrounds_for(colours) if facts.background in (None, name)]
        if not held_out:
            possible = [name for name in possible if not any(is_undrawn_sight(thing.shape, name) for thing in facts.objects)]
        if possible and held_out_facts(facts) == allowed:
            return Prompt(_text(category, facts, rng), category, facts)


def mixed_prompt(rng: np.random.Generator) -> Prompt:
    """What the categories keep apart, for training: any of number, colours, sizes, background, and place or relation. Nothing held out."""
    scene = random_scene(rng, objects=pick(rng, _MIXED_OBJECTS), refuse=is_undrawn)
    said = [name for name, share in (("colour", 0.6), ("size", 0.4)) if rng.random() < share]
    background = scene.background if rng.random() < 0.5 else None
    relations, place = (), None
    if len(scene.objects) == 2 and rng.random() < 0.6:
        relation = clear_relation(*scene.objects)
        relations = ((0, relation, 1),) if relation else ()
    elif len(scene.objects) == 1 and rng.random() < 0.3:
        place = place_of(scene.objects[0])
    facts = Facts(tuple(wanted(thing, *said, place=place) for thing in scene.objects), relations, background)
    return Prompt(styled(pick(rng, _OPENINGS), phrase(facts, rng), rng), MIXED, facts)


def make_prompts(category: str, count: int, *, seed: int, held_out: bool) -> list[Prompt]:
    """So many with different texts; the same arguments, the same list. Raises InputError if there are not as many."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, CATEGORIES.index(category), int(held_out)]))
    found: dict[str, Prompt] = {}
    for _ in range(_TRIES_PER_PROMPT * count):
        prompt = make_prompt(category, rng, held_out=held_out)
        found.setdefault(prompt.text, prompt)
        if len(found) == count:
            return list(found.values())
    raise InputError(f"{category}: only {len(found)} of {count} {'held-out ' if held_out else ''}prompts with different texts were found. "
                     "Ask for fewer.")


def scene_for(prompt: Prompt, rng: np.random.Generator) -> Scene:
    """A scene of which the prompt is true and that holds no held-out combination but those that it names.

    Mostly as most people would draw it (`USUAL`).
    """
    named = held_out_facts(prompt.facts)

    def refuse(scene: Scene) -> bool:
        return bool(held_out(scene) - named) if named else is_undrawn(scene)

    usual = usual_scene(prompt.facts, rng, refuse) if rng.random() < USUAL else None
    return usual or realise(prompt.facts, rng, refuse)


def _text(category: str, facts: Facts, rng: np.random.Generator) -> str:
    opening = pick(rng, _OPENINGS)
    if category == "single_object" and rng.random() < 0.3:
        text = pick(rng, ("one ", "a single ")) + amounts(facts.objects).split(" ", 1)[1] + on_background(facts.background, rng)
    elif category == "counting" and rng.random() < 0.3:
        count = len(facts.objects)
        number = pick(rng, (NUMBERS[count], str(count)))
        text = f"exactly {number} {plural(facts.objects[0].shape)}{on_background(facts.background, rng)}"
    else:
        text = phrase(facts, rng)
    return styled(opening, text, rng)


def _background(rng: np.random.Generator) -> str | None:
    return pick(rng, tuple(BACKGROUNDS)) if rng.random() < 0.4 else None


def _two_shapes(rng: np.random.Generator) -> list[str]:
    return [SHAPES[index] for index in rng.permutation(len(SHAPES))[:2]]


def _single_object(rng: np.random.Generator, held_out: bool) -> Facts:
    if held_out:
        shape, size, background = pick(rng, sorted(SHAPE_SIZE_BACKGROUNDS))
        return Facts((Wanted(shape, size=size),), background=background)
    size = pick(rng, tuple(SIZES)) if rng.random() < 0.4 else None
    return Facts((Wanted(pick(rng, SHAPES), size=size),), background=_background(rng))


def _two_objects(rng: np.random.Generator, held_out: bool) -> Facts:
    shapes = _two_shapes(rng)
    if held_out:
        pair = pick(rng, sorted(sorted(pair) for pair in SHAPE_PAIRS))
        shapes = pair if rng.random() < 0.5 else pair[::-1]
    return Facts(tuple(Wanted(shape) for shape in shapes), background=_background(rng))


def _counting(rng: np.random.Generator, held_out: bool) -> Facts:
    shape, count = pick(rng, sorted(SHAPE_COUNTS)) if held_out else (pick(rng, SHAPES), int(rng.integers(2, MAX_OBJECTS + 1)))
    return Facts((Wanted(shape),) * count, background=_background(rng))


def _colours(rng: np.random.Generator, held_out: bool) -> Facts:
    shape, colour = pick(rng, sorted(SHAPE_COLOURS)) if held_out else (pick(rng, SHAPES), pick(rng, tuple(COLOURS)))
    return Facts((Wanted(shape, colour),), background=_background(rng))


def _position(rng: np.random.Generator, held_out: bool) -> Facts:
    shapes, relation = _two_shapes(rng), pick(rng, tuple(RELATIONS))
    if held_out:
        first, relation, second = pick(rng, sorted(SHAPE_RELATIONS))
        shapes = [first, second]
        if rng.random() < 0.5:
            shapes, relation = [second, first], OPPOSITE[relation]
    return Facts(tuple(Wanted(shape) for shape in shapes), ((0, relation, 1),), _background(rng))


def _colour_attribution(rng: np.random.Generator, held_out: bool) -> Facts:
    things = []
    for number, shape in enumerate(_two_shapes(rng)):
        of_shape = [colour for colour in COLOURS if ((shape, colour) in SHAPE_COLOURS) == (held_out and number == 0)]
        things.append(Wanted(shape, pick(rng, of_shape)))
    if things[0].colour == things[1].colour:
        return _colour_attribution(rng, held_out)
    return Facts(tuple(things if rng.random() < 0.5 else things[::-1]), background=_background(rng))


_FACTS = {
    "single_object": _single_object, "two_objects": _two_objects, "counting": _counting, "colours": _colours, "position": _position,
    "colour_attribution": _colour_attribution,
}  # fmt: skip
