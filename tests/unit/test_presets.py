"""The preset questions: all that the issue lists, found by name, extended by a question."""

import re

import pytest

from blip3o_core.errors import InputError
from blip3o_core.presets import PRESETS, build_question, find_preset


def test_every_listed_preset_has_a_title_and_a_question():
    listed = "short_caption detailed_caption tags image_prompt ocr chart_to_table count reasoning json"
    assert list(PRESETS) == listed.split()
    for title, question in PRESETS.values():
        assert 3 < len(title) < 40
        assert question.strip() == question and "  " not in question
    assert len({question for _, question in PRESETS.values()}) == len(PRESETS)


def test_presets_can_not_be_changed_by_accident():
    with pytest.raises(TypeError):
        PRESETS["ocr"] = PRESETS["tags"]


@pytest.mark.parametrize(("typed", "nearest"), [("detailed-caption", "detailed_caption"), ("OCR", "ocr"), ("captions", "short_caption")])
def test_an_unknown_name_gets_the_nearest_one(typed, nearest):
    with pytest.raises(InputError, match=re.escape(f"no preset '{typed}'. Did you mean {nearest}?")):
        find_preset(typed)


def test_a_name_like_none_gets_the_whole_list():
    with pytest.raises(InputError, match="Presets are: short_caption, detailed_caption"):
        find_preset("zzzz")


def test_a_question_extends_a_preset():
    assert build_question("count", "Only the dogs.") == PRESETS["count"].question + "\nOnly the dogs."
    assert build_question("count", None) == PRESETS["count"].question
    assert build_question(None, " Why? ") == " Why? "


def test_a_question_needs_words():
    with pytest.raises(InputError, match="no question was given"):
        build_question(None, None)
    with pytest.raises(InputError, match="the question is empty"):
        build_question("count", " \n")
