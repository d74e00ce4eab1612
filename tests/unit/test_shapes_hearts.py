"""Hearts: drawn, captioned and judged, and unknown to everything that nano is trained on."""

import numpy as np
import pytest
from PIL import Image

from blip3o_core.errors import InputError
from blip3o_core.shapes.detector import detect
from blip3o_core.shapes.facts import random_scene, realise
from blip3o_core.shapes.hearts import KNOWN, PICTURES, heart_prompts, write_hearts, write_others
from blip3o_core.shapes.holdout import is_held_out
from blip3o_core.shapes.judge import judge_prompt
from blip3o_core.shapes.world import COLOURS, HEART, SHAPES, render


def test_thirty_pictures_with_true_captions_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        write_hearts(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 2 * PICTURES
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    colours = set()
    for picture in (tmp_path / "a").glob("*.png"):
        [heart] = [thing for thing in detect(Image.open(picture), KNOWN).objects if thing.shape == HEART]
        assert f"{heart.colour} heart" in picture.with_suffix(".txt").read_text()
        colours.add(heart.colour)
    assert colours == set(COLOURS)
    with pytest.raises(InputError, match="is not empty"):
        write_hearts(tmp_path / "a")


def test_other_pictures_hold_neither_hearts_nor_held_out_combinations(tmp_path):
    write_others(tmp_path / "others", count=24)
    scenes = [detect(Image.open(file)) for file in sorted((tmp_path / "others").glob("*.png"))]
    assert len(scenes) == 24 and len(list((tmp_path / "others").glob("*.txt"))) == 24
    assert not any(is_held_out(scene) for scene in scenes)
    assert all(thing.shape in SHAPES for scene in scenes for thing in scene.objects)
    assert not any("heart" in file.read_text() for file in (tmp_path / "others").glob("*.txt"))


def test_prompts_are_judged_right_for_hearts_and_wrong_for_any_other_shape():
    rng = np.random.default_rng(3)
    for prompt in heart_prompts(40, seed=0):
        picture = render(realise(prompt.facts, rng))
        assert judge_prompt(prompt.facts, detect(picture, KNOWN)).right, prompt
        assert not judge_prompt(prompt.facts, detect(picture)).right, "who doesn't know hearts sees something else"
    assert len({prompt.text for prompt in heart_prompts(40, seed=0)}) == 40


def test_a_detector_that_knows_hearts_takes_nothing_else_for_one():
    rng = np.random.default_rng(4)
    scenes = [random_scene(rng) for _ in range(60)]
    assert all(detect(render(scene), KNOWN) == detect(render(scene)) for scene in scenes)
    assert HEART not in SHAPES
