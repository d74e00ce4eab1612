"""The judge accepts what is right and refuses what differs in one fact, on detected pictures."""

import numpy as np
import pytest

from blip3o_core.shapes import edits, prompts
from blip3o_core.shapes.detector import detect
from blip3o_core.shapes.facts import random_scene
from blip3o_core.shapes.judge import judge_answer, judge_edit, judge_prompt, judge_reconstruction
from blip3o_core.shapes.questions import KINDS, Question, questions
from blip3o_core.shapes.world import Object, Scene, render

from .shapes_samples import altered, blurred, with_object

# What makes a picture wrong for a prompt of the category.
BREAKING = {
    "single_object": ("shape", "more", "fewer"), "two_objects": ("shape", "more", "fewer"), "counting": ("shape", "more", "fewer"),
    "colours": ("shape", "colour", "more"), "position": ("turned", "shape", "fewer"), "colour_attribution": ("colour", "shape", "more"),
}  # fmt: skip


def seen(scene: Scene, rng) -> Scene:
    return detect(blurred(render(scene), rng))


@pytest.mark.parametrize("category", prompts.CATEGORIES)
def test_pictures_of_a_prompt_are_right_and_those_that_differ_in_one_fact_are_wrong(category):
    rng = np.random.default_rng(6)
    for prompt in prompts.make_prompts(category, 12, seed=6, held_out=False) + prompts.make_prompts(category, 12, seed=6, held_out=True):
        scene = prompts.scene_for(prompt, rng)
        verdict = judge_prompt(prompt.facts, seen(scene, rng))
        assert verdict.right and verdict.reason == "", (prompt, verdict)
        for what in BREAKING[category]:
            wrong = altered(scene, what, rng)
            if wrong is not None:
                verdict = judge_prompt(prompt.facts, seen(wrong, rng))
                assert not verdict.right and verdict.reason, (prompt, what)
        if prompt.facts.background and (wrong := altered(scene, "background", rng)):
            assert judge_prompt(prompt.facts, seen(wrong, rng)).reason.startswith("the background is ")
        if prompt.facts.objects[0].size and (wrong := altered(scene, "size", rng)):
            assert "has the size" in judge_prompt(prompt.facts, seen(wrong, rng)).reason


def test_a_place_that_was_asked_for_is_checked():
    facts = prompts.Facts((prompts.Wanted("star", place="top left"),))
    assert judge_prompt(facts, Scene((Object("star", "red", "small", (0.2, 0.38)),), "white")).right  # a little beside it
    verdict = judge_prompt(facts, Scene((Object("star", "red", "small", (0.2, 0.5)),), "white"))
    assert verdict.reason == "the star is not in the place top left"


def test_what_a_prompt_leaves_open_may_be_anything():
    prompt = prompts.Prompt("a star", "single_object", prompts.Facts((prompts.Wanted("star"),)))
    for colour, size, background in (("red", "small", "sky"), ("white", "large", "grey")):
        assert judge_prompt(prompt.facts, Scene((Object("star", colour, size, (0.2, 0.7)),), background)).right


def test_colours_that_belong_to_the_other_object_are_wrong():
    facts = prompts.Facts((prompts.Wanted("circle", "red"), prompts.Wanted("square", "blue")))
    circle, square = Object("circle", "blue", "large", (0.3, 0.5)), Object("square", "red", "large", (0.7, 0.5))
    verdict = judge_prompt(facts, Scene((circle, square), "white"))
    assert not verdict.right
    assert verdict.reason == "the circle has the colour blue, not red; the square has the colour red, not blue"


def test_the_reason_names_the_object_that_is_wrong():
    facts = prompts.Facts((prompts.Wanted("circle", "red"), prompts.Wanted("square", "blue")), ((0, "left of", 1),))
    circle, square = Object("circle", "red", "large", (0.7, 0.5)), Object("square", "blue", "large", (0.3, 0.5))
    assert judge_prompt(facts, Scene((circle, square), "white")).reason == "the circle is not left of the square"
    assert judge_prompt(facts, Scene((circle,), "white")).reason == "1 objects, not 2"


@pytest.mark.parametrize("kind", edits.KINDS)
def test_an_edit_is_right_if_the_target_is_drawn_and_wrong_if_anything_else_changed_or_nothing(kind):
    rng = np.random.default_rng(8)
    collateral = 0
    for number in range(12):
        edit = edits.make_edit(kind, rng, held_out=number % 4 == 0 and kind != "remove")
        assert judge_edit(edit, seen(edit.target, rng)).right, edit
        verdict = judge_edit(edit, seen(edit.source, rng))
        assert not verdict.right and verdict.reason == "nothing was changed"
        others = [index for index in range(len(edit.target.objects)) if index != edit.subject]
        for what in ("colour", "shape", "size", "moved", "fewer") if others else ():
            wrong = altered(edit.target, what, rng, others[0])
            if wrong is not None:
                collateral += 1
                assert not judge_edit(edit, seen(wrong, rng)).right, (edit, what)
        if kind != "background" and (wrong := altered(edit.target, "background", rng)):
            assert not judge_edit(edit, seen(wrong, rng)).right
        if edit.subject is not None:
            for what in ("colour", "shape"):
                wrong = altered(edit.target, what, rng, edit.subject)
                assert wrong is None or not judge_edit(edit, seen(wrong, rng)).right, (edit, what)
    assert collateral > 12


def test_an_added_object_may_lie_anywhere_unless_the_instruction_tells_where():
    circle, star = Object("circle", "red", "large", (0.25, 0.5)), Object("star", "red", "small", (0.8, 0.2))
    source, target = Scene((circle,), "white"), Scene((circle, star), "white")
    anywhere = edits.Edit("add", source, "add a red star", target, 1, edits.Wanted("star", "red"), False)
    elsewhere = with_object(with_object(target, 1, centre=(0.8, 0.8)), 1, size="large")
    assert judge_edit(anywhere, elsewhere).right
    corner = edits.Edit("add", source, "", target, 1, edits.Wanted("star", "red", "small", "top right"), False)
    assert judge_edit(corner, target).right
    reason = judge_edit(corner, elsewhere).reason
    assert reason == "the size of the red star is large, not small; the red star is not in the place top right"
    above = edits.Edit("add", source, "", target, 1, edits.Wanted("star", "red"), False, ("above", 0))
    assert judge_edit(above, elsewhere).reason == "the red star is not above the circle"


def test_a_reconstruction_keeps_every_object_in_its_place():
    rng = np.random.default_rng(9)
    tried = 0
    for _ in range(25):
        scene = random_scene(rng)
        original = detect(render(scene))
        assert judge_reconstruction(original, seen(scene, rng)).right
        for what in ("colour", "shape", "size", "background", "moved", "fewer", "more"):
            wrong = altered(scene, what, rng)
            if wrong is not None:
                tried += 1
                assert not judge_reconstruction(original, seen(wrong, rng)).right, (scene, what)
    assert tried > 130


@pytest.mark.parametrize("kind, true, right, wrong", [
    ("colour", "red", ["Red.", "It is red", "The circle is red."], ["blue", "", "red or blue", "reddish"]),
    ("background", "sky blue", ["Sky blue", "light blue", "The background is sky blue.", "sky"], ["blue", "grey"]),
    ("background", "grey", ["gray", "It's grey."], ["white", "sky blue"]),
    ("shape", "cross", ["a cross", "Cross.", "The red object is a cross"], ["circle", "a cross or a star", ""]),
    ("count", "three", ["3", "Three.", "There are three circles."], ["two", "4", "three or four", "many", ""]),
    ("count", "zero", ["0", "There are no circles.", "none"], ["one", "two"]),
    ("yes_no", "yes", ["Yes", "yes, there is."], ["no", "No, yes", "maybe", ""]),
    ("yes_no", "no", ["No.", "no, it is not"], ["yes"]),
    ("where", "in the top left corner", ["top left", "at the upper left", "upper-left corner"], ["top right", "left", "at the top", ""]),
    ("where", "at the top", ["top", "at the top in the middle", "At the upper center."], ["bottom", "top left", "in the middle"]),
    ("where", "in the centre", ["In the middle.", "center"], ["left", "top"]),
    ("where", "left of the blue square", ["to the left of the square", "left of it"], ["right of the blue square", "above the square"]),
    ("where", "below the square", ["under the square", "Beneath it."], ["above the square"]),
    ("list", "two red circles and a blue square",
     ["a blue square, two red circles", "A red circle, a red circle and a blue square.", "2 red circles and 1 blue square"],
     ["a red circle and a blue square", "two red circles", "two blue circles and a red square", "two circles and a square", ""]),
])  # fmt: skip
def test_answers_are_compared_by_meaning(kind, true, right, wrong):
    question = Question(kind, "", true)
    assert [text for text in right if not judge_answer(question, text).right] == []
    assert [text for text in wrong if judge_answer(question, text).right] == []
    assert judge_answer(question, wrong[0]).reason == f"{wrong[0]!r}, not {true!r}"


def test_the_true_answer_of_every_question_is_right_and_that_of_another_question_wrong():
    rng = np.random.default_rng(10)
    kinds = set()
    for _ in range(60):
        asked = questions(random_scene(rng), rng)
        assert all(judge_answer(question, question.answer).right for question in asked)
        for question in asked:
            kinds.add(question.kind)
            others = [other.answer for other in asked if other.kind not in (question.kind, "list", "where")]
            others = [answer for answer in others if answer != question.answer and question.kind != "list"]
            assert not any(judge_answer(question, answer).right for answer in others), (question, others)
    assert kinds == set(KINDS)
