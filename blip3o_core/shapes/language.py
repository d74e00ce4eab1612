"""Words for facts and scenes: noun phrases, references, captions. The generator of random numbers chooses among equal wordings."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from .facts import Facts, Wanted, wanted
from .world import CORNERS, RELATIONS, Object, Scene, clear_relation, pick, place_of

NUMBERS = ("zero", "one", "two", "three", "four")
PLACE_PHRASES = {
    **{corner: (f"in the {corner} corner", f"at the {corner}", f"in the {corner.replace('top', 'upper').replace('bottom', 'lower')} corner")
       for corner in CORNERS},
    "top": ("at the top", "at the top in the middle"),
    "bottom": ("at the bottom", "at the bottom in the middle"),
    "left": ("on the left", "on the left side"),
    "right": ("on the right", "on the right side"),
    "centre": ("in the centre", "in the middle", "in the center"),
}  # fmt: skip
"""The first is the one that answers use."""
RELATION_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"), "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above",), "below": ("below", "under", "beneath"),
}  # fmt: skip
_BESIDE_IT = {"left of": ("to its left", "on its left"), "right of": ("to its right", "on its right"), "above": ("above it",),
              "below": ("below it", "under it")}  # fmt: skip
_REFERENCES = (("colour", "shape"), ("shape",), ("size", "shape"), ("size", "colour", "shape"), ("colour",), ("size",), ("size", "colour"))
_ON_BACKGROUND = ("on a {} background", "against a {} background", "in front of a {} background")


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("ss") else "s")


def listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def background_name(background: str, rng: np.random.Generator | None = None) -> str:
    """What the colour is called; with a generator sometimes in American spelling."""
    if background == "grey":
        return "grey" if rng is None else pick(rng, ("grey", "grey", "gray"))
    return {"sky": "sky blue"}.get(background, background)


def on_background(background: str | None, rng: np.random.Generator | None = None) -> str:
    """With a space before it; empty for no background."""
    if background is None:
        return ""
    return " " + (_ON_BACKGROUND[0] if rng is None else pick(rng, _ON_BACKGROUND)).format(background_name(background, rng))


def noun(thing: Wanted) -> str:
    """Without article: small red circle."""
    return " ".join(word for word in (thing.size, thing.colour, thing.shape) if word)


def amount(count: int, thing: Wanted, rng: np.random.Generator | None = None) -> str:
    """a red circle; two red circles; sometimes 2 red circles; with its place, if it has one."""
    place = "" if thing.place is None else " " + (PLACE_PHRASES[thing.place][0] if rng is None else pick(rng, PLACE_PHRASES[thing.place]))
    if count == 1:
        return with_article(noun(thing)) + place
    number = str(count) if rng is not None and rng.random() < 0.3 else NUMBERS[count]
    return f"{number} {plural(noun(thing))}{place}"


def amounts(things: Sequence[Wanted], rng: np.random.Generator | None = None) -> str:
    """Everything in its order, equals counted: a red circle and two blue squares."""
    return listed([amount(count, thing, rng) for thing, count in Counter(things).items()])


def phrase(facts: Facts, rng: np.random.Generator) -> str:
    """All facts as one noun phrase; of relations at most one, between two objects."""
    background = on_background(facts.background, rng)
    if not facts.relations:
        return amounts(facts.objects, rng) + background
    assert len(facts.objects) == 2 and len(facts.relations) == 1, facts
    first, relation, second = facts.relations[0]
    here, there = amount(1, facts.objects[first], rng), amount(1, facts.objects[second], rng)
    if rng.random() < 0.2:
        return f"{there} with {here} {pick(rng, _BESIDE_IT[relation])}{background}"
    return f"{here} {pick(rng, RELATION_PHRASES[relation])} {there}{background}"


def references(scene: Scene, index: int, *, without: str = "") -> list[str]:
    """Phrases that mean this object only ("red circle", "large object"), not naming the attribute `without`."""
    thing = scene.objects[index]
    found = []
    for said in _REFERENCES:
        if without in said or sum(all(getattr(other, name) == getattr(thing, name) for name in said) for other in scene.objects) > 1:
            continue
        found.append(" ".join(getattr(thing, name) for name in said) + ("" if "shape" in said else " object"))
    return found


def refer(scene: Scene, index: int, rng: np.random.Generator, *, without: str = "") -> str | None:
    """One of the shorter references, or None if there is none."""
    found = references(scene, index, without=without)
    return pick(rng, found[:3]) if found else None


def left_to_right(scene: Scene) -> list[Object]:
    return sorted(scene.objects, key=lambda thing: thing.centre)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """Short: shapes and colours, sometimes sizes, background, or how two objects lie."""
    said = ("colour", "size") if rng.random() < 0.25 else ("colour",)
    background = scene.background if rng.random() < 0.5 else None
    relations = ()
    if len(scene.objects) == 2 and rng.random() < 0.7:
        first, second = (0, 1) if rng.random() < 0.5 else (1, 0)
        relation = clear_relation(scene.objects[first], scene.objects[second])
        relations = ((first, relation, second),) if relation else ()
    place = place_of(scene.objects[0]) if len(scene.objects) == 1 and rng.random() < 0.5 else None
    facts = Facts(tuple(wanted(thing, *said, place=place) for thing in scene.objects), relations, background)
    return styled(pick(rng, ("{}", "{}", "a picture of {}", "there {be} {}")), phrase(facts, rng), rng, several=len(scene.objects) > 1)


def complete_caption(scene: Scene, rng: np.random.Generator) -> str:
    """One phrase with all that the picture shows: of each object, in any order, size, colour and place; and the background."""
    things = [scene.objects[index] for index in rng.permutation(len(scene.objects)).tolist()]
    facts = Facts(tuple(wanted(thing, "colour", "size", place=place_of(thing)) for thing in things), background=scene.background)
    return styled(pick(rng, ("{}", "{}", "a picture of {}", "there {be} {}")), phrase(facts, rng), rng, several=len(things) > 1)


def styled(template: str, text: str, rng: np.random.Generator, *, several: bool = False) -> str:
    """The text in a template, as a sentence or not."""
    text = template.replace("{be}", "are" if several and not text.startswith(("a ", "an ")) else "is").replace("{}", text)
    return sentence(text) if rng.random() < 0.4 else text


def detailed_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Everything: number, background, and of each object colour, size and place, or where it lies from another."""
    things = left_to_right(scene)
    phrases = [amount(1, wanted(thing, "colour", "size", place=place_of(thing)), rng) for thing in things]
    background = background_name(scene.background, rng)
    count = len(things)
    if count == 1:
        opening = pick(rng, (f"the picture shows {phrases[0]}", f"there is {phrases[0]}"))
        first = pick(rng, (f"{opening}, on a {background} background", f"{opening}; the background is {background}"))
        return sentence(first)
    start = pick(rng, (
        f"there are {NUMBERS[count]} objects on a {background} background: ", f"{NUMBERS[count]} objects on a {background} background: ",
        f"on a {background} background there are ",
    ))  # fmt: skip
    if start.endswith("are "):
        start = start.removesuffix("are ") + "is "  # the first of the list is one object
    sentences = [sentence(start + listed(phrases))]
    scene = Scene(tuple(things), scene.background)
    for second in range(1, count):
        first = second - 1
        relation = clear_relation(things[first], things[second])
        names = references(scene, first)[:2], references(scene, second)[:2]
        if relation and all(names):
            sentences.append(sentence(f"the {pick(rng, names[0])} is {pick(rng, RELATION_PHRASES[relation])} the {pick(rng, names[1])}"))
    return " ".join(sentences)


assert RELATION_PHRASES.keys() == RELATIONS.keys()
