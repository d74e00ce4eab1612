"""Words are true of their scenes, well formed, and never name what is held out from training."""

import re
from collections import Counter

import numpy as np
import pytest

from blip3o_core.errors import InputError
from blip3o_core.shapes import edits, prompts, questions, texts
from blip3o_core.shapes.datasets import described_scene
from blip3o_core.shapes.facts import Facts, Wanted, fault, random_scene
from blip3o_core.shapes.holdout import (
    SHAPE_COLOURS,
    SHAPE_COUNTS,
    SHAPE_PAIRS,
    SHAPE_RELATIONS,
    SHAPE_SIZE_BACKGROUNDS,
    held_out,
    held_out_facts,
    is_held_out,
    is_held_out_relation,
    is_undrawn,
)
from blip3o_core.shapes.language import (
    NUMBERS,
    PLACE_PHRASES,
    caption,
    complete_caption,
    detailed_caption,
    phrase,
    plural,
    refer,
    references,
    with_article,
)
from blip3o_core.shapes.world import BACKGROUNDS, COLOURS, SHAPES, SIZES, Object, Scene, is_possible, place_of

RED_CIRCLE = Object("circle", "red", "large", (0.25, 0.5))
BLUE_SQUARE = Object("square", "blue", "small", (0.75, 0.5))
SMALL_CIRCLE = Object("circle", "red", "small", (0.75, 0.2))


def texts_of_training(count: int) -> list[str]:
    """Of every kind, from scenes as they are trained on."""
    rng = np.random.default_rng(7)
    found = []
    for _ in range(count):
        scene = random_scene(rng, refuse=is_held_out)
        found += [describe(scene, rng) for describe in (caption, detailed_caption, complete_caption)]
        found += [prompts.make_prompt(prompts.CATEGORIES[len(found) % 6], rng).text, prompts.mixed_prompt(rng).text]
        found += [text for question in questions.questions(scene, rng) for text in (question.text, question.answer)]
        found += [edits.make_edit(edits.KINDS[len(found) % 6], rng).instruction]
        found += [text for kind in texts.KINDS for task in [texts.make_text(kind, rng)] for text in (task.question, task.answer)]
    return found


RELATION_QUESTION = re.compile(r"(\w+) (?:to the |on the )?(left of|right of|above|below|under|beneath) the (?:\w+ )*?(\w+)\?")
TEXTS = texts_of_training(60)


def test_grammar_of_articles_plurals_and_spaces():
    assert with_article("orange ring") == "an orange ring" and with_article("small orange ring") == "a small orange ring"
    assert [plural(shape) for shape in SHAPES] == ["circles", "squares", "triangles", "stars", "rings", "crosses"]
    for text in TEXTS:
        assert not re.search(r"\ba [aeio]|\ban [^aeio]| {2}| [.,;?]|[{}]|None", text), text
        assert not re.search(rf"\b(two|three|four|[234]) (small |large )?(\w+ )?({'|'.join(SHAPES)})\b[^;,]*$", text) or "Expand" in text \
            or "prompt" in text, text  # fmt: skip
        assert not re.search(rf"\b(a|an|one|single) (small |large )?(\w+ )?({'|'.join(map(plural, SHAPES))})\b", text), text


def test_wording_varies():
    rng = np.random.default_rng(0)
    scene = Scene((RED_CIRCLE, BLUE_SQUARE), "white")
    assert len({caption(scene, rng) for _ in range(200)}) > 30
    assert len({detailed_caption(scene, rng) for _ in range(200)}) > 10
    facts = Facts((Wanted("circle", "red"), Wanted("square", "blue")), ((0, "left of", 1),))
    found = {phrase(facts, rng) for _ in range(60)}
    assert {"a red circle left of a blue square", "a blue square with a red circle to its left"} <= found


def test_complete_captions_leave_nothing_open():
    rng = np.random.default_rng(1)
    places = {words: place for place, phrases in PLACE_PHRASES.items() for words in phrases}
    for _ in range(100):
        scene = random_scene(rng)
        text = complete_caption(scene, rng).lower().rstrip(".")
        counted = Counter()
        thing = rf"(\w+) (small|large) (\w+) ({'|'.join(SHAPES)})(?:es|s)? ({'|'.join(sorted(places, key=len, reverse=True))})"
        for number, size, colour, shape, words in re.findall(thing, text):
            counted[shape, colour, size, places[words]] += {"a": 1, "one": 1}.get(number) or (
                NUMBERS.index(number) if number in NUMBERS else int(number)
            )
        assert counted == Counter((own.shape, own.colour, own.size, place_of(own)) for own in scene.objects), text
        assert re.search(rf"{'gr[ae]y' if scene.background == 'grey' else scene.background}( blue)? background", text), text


def test_references_mean_one_object_only():
    scene = Scene((RED_CIRCLE, BLUE_SQUARE, SMALL_CIRCLE), "white")
    assert references(scene, 1) == ["blue square", "square", "small square", "small blue square", "blue object", "small blue object"]
    assert references(scene, 0) == ["large circle", "large red circle", "large object", "large red object"]
    assert references(scene, 2) == ["small circle", "small red circle", "small red object"]
    assert not any("blue" in text for text in references(scene, 1, without="colour"))
    twins = Scene((RED_CIRCLE, Object("circle", "red", "large", (0.75, 0.5))), "white")
    assert refer(twins, 0, np.random.default_rng(0)) is None


def test_no_text_of_training_names_a_held_out_shape_and_colour():
    for shape, colour in SHAPE_COLOURS:
        named = re.compile(rf"\b{colour} {shape}", re.IGNORECASE)
        assert not [text for text in TEXTS if named.search(text)]


@pytest.mark.parametrize("kind", ["yes_no", "count"])
def test_questions_about_what_is_absent_name_no_held_out_shape_and_colour(kind):
    rng = np.random.default_rng(11)
    asked = [questions.ask(kind, scene, rng) for scene in (random_scene(rng, objects=1, refuse=is_held_out) for _ in range(700))]
    named = re.compile("|".join(rf"\b{colour} {shape}|\b{shape} {colour}\b" for shape, colour in SHAPE_COLOURS))
    assert not [question for question in asked if question and named.search(question.text)]


def test_questions_that_are_answered_no_name_no_held_out_relation():
    rng = np.random.default_rng(3)
    asked = 0
    for _ in range(300):
        question = questions.ask("yes_no", random_scene(rng, objects=2, refuse=is_held_out), rng)
        found = question and RELATION_QUESTION.search(question.text)
        if found:
            first, relation, second = found.groups()
            relation = {"under": "below", "beneath": "below"}.get(relation, relation)
            asked += 1
            assert not is_held_out_relation(first, relation, second), question
    assert asked > 30


@pytest.mark.parametrize("kind", [*edits.KINDS])
def test_neither_side_of_an_edit_for_training_is_held_out_but_the_target_of_one_for_evaluation_is(kind):
    rng = np.random.default_rng(2)
    for _ in range(12):
        edit = edits.make_edit(kind, rng)
        assert not is_held_out(edit.source) and not is_held_out(edit.target)
    if kind != "remove":
        assert is_held_out(edits.make_edit(kind, rng, held_out=True).target)


def test_the_held_out_list_is_as_documented():
    """A change of it invalidates every number measured before."""
    assert {("circle", 3), ("square", 2), ("triangle", 4), ("star", 3), ("ring", 2), ("cross", 4)} == SHAPE_COUNTS
    assert {
        ("ring", "red"), ("triangle", "green"), ("star", "blue"), ("cross", "yellow"), ("circle", "purple"), ("square", "orange"),
        ("triangle", "white"), ("star", "black"),
    } == SHAPE_COLOURS  # fmt: skip
    assert sorted(colour for _, colour in SHAPE_COLOURS) == sorted(COLOURS)
    assert max(Counter(shape for shape, _ in SHAPE_COLOURS).values()) <= 2
    assert sorted(shape for pair in SHAPE_PAIRS for shape in pair) == sorted(SHAPES)
    assert sorted(shape for shape, _ in SHAPE_COUNTS) == sorted(SHAPES)
    assert sorted(shape for shape, _, _ in SHAPE_SIZE_BACKGROUNDS) == sorted(SHAPES)
    assert {size for _, size, _ in SHAPE_SIZE_BACKGROUNDS} == set(SIZES)
    assert {background for _, _, background in SHAPE_SIZE_BACKGROUNDS} == set(BACKGROUNDS)
    assert len(SHAPE_RELATIONS) == 8 and not any(frozenset((a, b)) in SHAPE_PAIRS for a, _, b in SHAPE_RELATIONS)
    assert not is_held_out_relation("circle", "left of", "square")  # the example that everybody tries first


@pytest.mark.parametrize("objects, background, kind", [
    ([Object("ring", "red", "large", (0.5, 0.5))], "white", "colour"),
    ([Object("circle", "red", "small", (0.5, 0.5))], "white", "sight"),
    ([RED_CIRCLE, Object("cross", "red", "small", (0.25, 0.1))], "white", "pair"),
    ([RED_CIRCLE, Object("triangle", "red", "small", (0.75, 0.6))], "white", "relation"),
    ([Object("triangle", "red", "small", (0.75, 0.6)), RED_CIRCLE], "white", "relation"),
    ([BLUE_SQUARE, Object("square", "red", "small", (0.2, 0.2))], "white", "count"),
])  # fmt: skip
def test_each_kind_of_held_out_combination_is_recognised(objects, background, kind):
    assert held_out(Scene(tuple(objects), background)) == {kind}
    assert not is_held_out(Scene((RED_CIRCLE, BLUE_SQUARE), background))


def test_what_would_contradict_a_held_out_size_is_not_drawn_either():
    """Large squares on sky are held out: small ones only would teach that squares on sky are small."""
    square = Object("square", "red", "small", (0.5, 0.5))
    assert is_undrawn(Scene((square,), "sky")) and not is_held_out(Scene((square,), "sky"))
    assert not is_undrawn(Scene((square,), "white")) and is_undrawn(Scene((Object("ring", "red", "small", (0.5, 0.5)),), "white"))
    rng = np.random.default_rng(3)
    assert not any(is_undrawn(edits.make_edit(kind, rng).target) for kind in edits.KINDS for _ in range(8))
    assert not any(is_undrawn(described_scene(rng)[0]) for _ in range(60))


@pytest.mark.parametrize("category", prompts.CATEGORIES)
@pytest.mark.parametrize("is_out", [True, False])
def test_a_prompt_names_held_out_combinations_of_its_category_or_none(category, is_out):
    rng = np.random.default_rng(1)
    found = prompts.make_prompts(category, 100, seed=5, held_out=is_out)
    assert found == prompts.make_prompts(category, 100, seed=5, held_out=is_out)
    assert len({prompt.text for prompt in found}) == 100
    expected = {prompts.HELD_OUT_KIND[category]} if is_out else set()
    for prompt in found:
        assert held_out_facts(prompt.facts) == expected
        for thing in prompt.facts.objects:  # what is judged is what is written
            assert thing.shape in prompt.text.lower()
            assert thing.colour is None or thing.colour in prompt.text.lower()
        assert (prompt.facts.background is None) == ("background" not in prompt.text)
    for prompt in found[:15]:
        scene = prompts.scene_for(prompt, rng)
        assert is_possible(scene) and held_out(scene) == expected and fault(prompt.facts, scene) == ""


def test_mixed_prompts_join_what_the_categories_keep_apart_and_hold_out_the_same():
    rng = np.random.default_rng(0)
    found = [prompts.mixed_prompt(rng) for _ in range(400)]
    for prompt in found:
        scene = prompts.scene_for(prompt, rng)
        assert not held_out_facts(prompt.facts) and not is_held_out(scene) and fault(prompt.facts, scene) == ""
        assert all(thing.colour is None or thing.colour in prompt.text.lower() for thing in prompt.facts.objects)
    facts = [prompt.facts for prompt in found]
    assert any(one.relations and all(thing.colour for thing in one.objects) for one in facts)  # a red circle left of a blue square
    assert any(one.background and one.objects[0].size and not one.objects[0].colour for one in facts)
    assert {len(one.objects) for one in facts} == {1, 2, 3} and any(one.objects[0].place for one in facts)


def test_asking_for_more_prompts_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setattr(prompts, "_TRIES_PER_PROMPT", 1)
    with pytest.raises(InputError, match=r"single_object: only \d+ of 3000 held-out prompts"):
        prompts.make_prompts("single_object", 3000, seed=0, held_out=True)


def test_questions_of_every_kind_are_answered_by_the_scene():
    scene = Scene((RED_CIRCLE, BLUE_SQUARE), "sky")
    rng = np.random.default_rng(0)
    asked = [question for _ in range(60) for question in questions.questions(scene, rng)]
    answers = {kind: {(q.text, q.answer) for q in asked if q.kind == kind} for kind in questions.KINDS}
    assert ("What colour is the circle?", "red") in answers["colour"]
    assert ("Which shape is the blue object?", "square") in answers["shape"]
    assert {answer for text, answer in answers["count"] if text == "How many objects are there?"} == {"two"}
    assert ("Where is the circle?", "on the left") in answers["where"]
    assert {answer for text, answer in answers["where"] if "compared to the square" in text} == {"left of the square"}
    assert {answer for text, answer in answers["yes_no"] if "background" in text} == {"yes", "no"}
    assert {answer for _, answer in answers["list"]} == {"a red circle and a blue square"}
    assert {answer for _, answer in answers["background"]} == {"sky blue"}
    assert not any("red" in text for text, answer in answers["colour"] if answer == "red")
    assert not any("circle" in text for text, answer in answers["shape"] if answer == "circle")


def test_yes_and_no_are_equally_frequent():
    rng = np.random.default_rng(0)
    found = Counter(question.answer for _ in range(300) for question in [questions.ask("yes_no", random_scene(rng), rng)] if question)
    assert 0.4 < found["yes"] / found.total() < 0.6


@pytest.mark.parametrize("kind, changes", [
    ("recolour", {"colour"}), ("replace", {"shape"}), ("move", {"centre"}), ("background", set()), ("add", set()), ("remove", set()),
])  # fmt: skip
def test_an_edit_changes_what_it_says_and_nothing_else(kind, changes):
    rng = np.random.default_rng(4)
    for _ in range(15):
        edit = edits.make_edit(kind, rng)
        source, target = edit.source.objects, edit.target.objects
        assert is_possible(edit.source) and is_possible(edit.target)
        assert (edit.source.background != edit.target.background) == (kind == "background")
        assert len(target) - len(source) == {"add": 1, "remove": -1}.get(kind, 0)
        if kind in ("add", "remove"):
            assert set(min(source, target, key=len)) < set(max(source, target, key=len))
            continue
        differing = {name for one, other in zip(source, target, strict=True) for name in ("shape", "colour", "size", "centre")
                     if getattr(one, name) != getattr(other, name)}  # fmt: skip
        assert changes <= differing <= changes | ({"colour"} if kind == "replace" else set())
        if kind == "move" and edit.said.place:
            assert place_of(target[edit.subject]) == edit.said.place


def test_text_tasks_have_the_answers_that_their_questions_ask_for():
    rng = np.random.default_rng(9)
    made = {kind: [texts.make_text(kind, rng) for _ in range(25)] for kind in texts.KINDS}
    for task in made["rewrite"]:
        terse = task.question.split(": ", 1)[1]
        assert {name for name in COLOURS if name in terse.replace("sky blue", "")} == \
            {name for name in COLOURS if name in task.answer.lower().replace("sky blue", "")}  # fmt: skip
    for task in made["colours"]:
        objects = re.split(r" (?:on|against|in front of) a ", task.question, maxsplit=1)[0].lower()
        assert {name for name in COLOURS if re.search(rf"\b{name}\b", objects)} == {name for name in COLOURS if name in task.answer}
    answers = Counter(task.answer.split(",")[0] for task in made["compare"])
    assert answers.keys() == {"Yes", "No"} and min(answers.values()) > 5


def test_a_held_out_removal_is_refused_instead_of_searched_for_ever():
    with pytest.raises(InputError, match="can't be held out"):
        edits.make_edit("remove", np.random.default_rng(0), held_out=True)
