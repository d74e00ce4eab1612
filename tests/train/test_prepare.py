"""Samples become examples: the same for the same position on any machine, and what the cache holds is what is asked for."""

import hashlib
import io
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_core.data.broken import BrokenSample
from blip3o_core.data.cache import FeatureCache, content_key
from blip3o_core.data.prepare import Augmentation, Preparer, picture_square
from blip3o_core.data.sample import Sample
from blip3o_core.errors import ConfigError
from blip3o_core.images import eva_pixel_values, qwen_pixel_values
from blip3o_core.prompts import RECONSTRUCT_INSTRUCTION, PromptTokenizer
from blip3o_core.train.config import load_config


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint) -> PromptTokenizer:
    return PromptTokenizer(tiny_checkpoint)


@pytest.fixture
def prepare(tokenizer):
    """prepare(flip=0.5, ..., seed=0): a preparer for small pictures."""

    def make(*, seed: int = 0, caches: tuple = (None, None), **augmentation) -> Preparer:
        return Preparer(tokenizer, Augmentation(**augmentation), seed, eva_size=56, targets=caches[0], states=caches[1])

    return make


@pytest.fixture
def wide(tmp_path) -> Sample:
    """A caption and a picture of 40 x 20 pixels, each another colour."""
    colours = np.arange(40 * 20 * 3).reshape(20, 40, 3) % 251
    file = tmp_path / "wide.png"
    Image.fromarray(colours.astype(np.uint8)).save(file)
    return Sample("wide", "text_to_image", text="a red fox", target=file)


def as_edit(sample: Sample) -> Sample:
    return replace(sample, task="edit", text="make it blue", images=(sample.target,))


def as_reconstruct(sample: Sample) -> Sample:
    return replace(sample, task="reconstruct", text="", images=(sample.target,))


def digest(preparer: Preparer, sample: Sample, positions: range) -> str:
    hashed = hashlib.sha256()
    for position in positions:
        example = preparer(sample, position)
        hashed.update(repr(example.ids).encode())
        hashed.update(example.target_pixels.numpy().tobytes())
    return hashed.hexdigest()


def test_a_trigger_stands_before_the_caption_and_goes_with_it(prepare, wide, tokenizer):
    assert prepare(trigger="xyz")(wide, 0).ids == tokenizer.training_ids("xyz, a red fox")
    assert prepare(trigger="xyz")(replace(wide, text=""), 0).ids == tokenizer.training_ids("xyz")
    assert prepare(trigger="xyz", caption_dropout=1)(wide, 0).ids == tokenizer.training_ids("")


def test_captions_are_dropped_as_often_as_said(prepare, wide, tokenizer):
    preparer, empty = prepare(caption_dropout=0.25), tokenizer.training_ids("")
    dropped = sum(preparer(wide, position).ids == empty for position in range(600))
    assert 0.19 < dropped / 600 < 0.31  # 3.4 standard deviations


def test_the_prompt_form_of_the_published_training_closes_the_turn(prepare, wide, tokenizer):
    closed = replace(prepare(), closed_turn=True)(wide, 0).ids
    assert closed == tokenizer.training_ids("a red fox", closed=True) != tokenizer.training_ids("a red fox")


def test_without_augmentation_pixels_are_those_of_the_encoder(prepare, wide):
    pixels = prepare()(wide, 3).target_pixels
    assert torch.equal(pixels, eva_pixel_values([Image.open(wide.target)], size=56)[0])


def test_a_flip_is_the_mirror_and_happens_as_often_as_said(prepare, wide):
    plain, preparer = prepare()(wide, 0).target_pixels, prepare(flip=0.25)
    mirrored = eva_pixel_values([Image.open(wide.target).transpose(Image.Transpose.FLIP_LEFT_RIGHT)], size=56)[0]
    found = [preparer(wide, position).target_pixels for position in range(300)]
    flips = sum(torch.equal(pixels, mirrored) for pixels in found)
    assert flips + sum(torch.equal(pixels, plain) for pixels in found) == 300
    assert 0.16 < flips / 300 < 0.34


def test_random_crops_reach_both_ends(prepare, wide):
    preparer = prepare(crop="random")
    image = Image.open(wide.target)
    places = [eva_pixel_values([image.crop((left, 0, left + 20, 20))], size=56)[0] for left in range(21)]
    found = set()
    for position in range(200):
        pixels = preparer(wide, position).target_pixels
        found.add(next(left for left, place in enumerate(places) if torch.equal(place, pixels)))
    assert {0, 20} <= found and len(found) > 15


AUGMENTED = {"flip": 0.5, "crop": "random", "caption_dropout": 0.3}


def test_a_position_always_gives_the_same_example_in_any_process(prepare, wide, tiny_checkpoint):
    preparer = prepare(**AUGMENTED)
    here = digest(preparer, wide, range(20))
    assert digest(preparer, wide, range(20)) == here  # nothing is kept between calls
    assert digest(prepare(seed=1, **AUGMENTED), wide, range(20)) != here
    assert digest(preparer, wide, range(20, 40)) != here
    code = (
        "import sys; sys.path.insert(0, sys.argv[3]); from test_prepare import *\n"
        "preparer = Preparer(PromptTokenizer(Path(sys.argv[1])), Augmentation(**AUGMENTED), 0, eva_size=56)\n"
        "sample = Sample('wide', 'text_to_image', text='a red fox', target=Path(sys.argv[2]))\n"
        "print(digest(preparer, sample, range(20)))"
    )
    words = [tiny_checkpoint, wide.target, Path(__file__).parent]
    other = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == here


def test_the_prompt_of_a_reconstruction_shows_the_part_that_is_learned(prepare, wide, tokenizer):
    """As in the reference: short side to 448, then the centre, for both towers."""
    image = Image.open(wide.target)
    example = prepare()(as_reconstruct(wide), 0)
    assert torch.equal(example.pixel_values, qwen_pixel_values([picture_square(image, 448)], size=(448, 448))[0])
    assert torch.equal(example.target_pixels, eva_pixel_values([image], size=56)[0])
    assert example.ids == tokenizer.training_ids(RECONSTRUCT_INSTRUCTION, image_tokens=[256])
    cropped = prepare(crop="random", flip=1.0)(as_reconstruct(wide), 5)
    left = next(left for left in range(21) if torch.equal(cropped.target_pixels, eva_pixel_values(
        [image.crop((left, 0, left + 20, 20)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)], size=56)[0]))  # fmt: skip
    part = image.crop((left, 0, left + 20, 20)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    assert torch.equal(cropped.pixel_values, qwen_pixel_values([picture_square(part, 448)], size=(448, 448))[0])


@pytest.mark.parametrize("form", [lambda sample: sample, as_edit, as_reconstruct], ids=["text_to_image", "edit", "reconstruct"])
@pytest.mark.parametrize("flip, dropout", [(0, 0), (0.5, 0), (0, 0.5), (0.5, 0.5), (1, 1)])
def test_the_keys_of_every_draw_are_among_those_of_the_variants(form, flip, dropout, prepare, wide, tmp_path):
    sample = form(wide)
    caches = FeatureCache(tmp_path / "eva"), FeatureCache(tmp_path / "states")
    preparer = prepare(caches=caches, flip=flip, caption_dropout=dropout)
    variants = {(example.target_key, example.states_key) for example in preparer.variants(sample)}
    drawn = {(example.target_key, example.states_key) for example in (preparer(sample, position) for position in range(40))}
    assert drawn == variants and all(key for pair in variants for key in pair)  # 40 draws meet all four


def test_what_is_cached_is_read_instead_of_the_picture(prepare, wide, tmp_path):
    targets, states = FeatureCache(tmp_path / "eva"), FeatureCache(tmp_path / "states")
    preparer = prepare(caches=(targets, states))
    first = preparer(wide, 0)
    assert first.target is None and first.target_pixels is not None and first.ids
    targets.store(first.target_key, torch.full((48, 8, 8), 2.0))
    states.store(first.states_key, torch.full((64, 64), 3.0))
    second = preparer(wide, 0)
    assert second.target_pixels is None and not second.ids
    assert second.target.unique().tolist() == [2.0] and second.states.unique().tolist() == [3.0]
    file = targets.path(first.target_key)
    file.write_bytes(file.read_bytes()[:-10])
    assert preparer(wide, 0).target_pixels is not None, "a damaged entry counts as absent"


def test_keys_follow_content_size_and_form_but_not_the_name(prepare, wide, tmp_path):
    caches = FeatureCache(tmp_path / "eva"), FeatureCache(tmp_path / "states")

    def keys(sample: Sample, **changes) -> tuple[str, str]:
        example = replace(prepare(caches=caches), **changes)(sample, 0)
        return example.target_key, example.states_key

    renamed = tmp_path / "renamed.png"
    shutil.copy(wide.target, renamed)
    changed = tmp_path / "changed.png"
    Image.new("RGB", (40, 20)).save(changed)
    target, state = keys(wide)
    assert keys(replace(wide, target=renamed, name="renamed")) == (target, state)
    assert keys(replace(wide, target=wide.target.read_bytes())) == (target, state), "out of a tar"
    assert keys(replace(wide, target=changed)) == (keys(replace(wide, target=changed))[0], state) != (target, state)
    assert keys(wide, eva_size=112) == (keys(wide, eva_size=112)[0], state) != (target, state)
    assert keys(wide, closed_turn=True)[0] == target and keys(wide, closed_turn=True)[1] != state
    assert keys(replace(wide, text="another"))[1] != state
    edit = as_edit(wide)
    assert keys(replace(edit, images=(changed,)))[1] != keys(edit)[1], "the picture before the instruction counts"
    assert content_key((b"ab", b"c")) != content_key((b"a", b"bc"))


def test_edits_are_not_flipped():
    with pytest.raises(ConfigError, match="data.0.flip: mirrored pictures contradict the words left and right of the task edit"):
        load_config(None, ["data.0.path=x", "data.0.task=edit", "data.0.flip=0.5"])


def test_pictures_that_can_not_be_read_and_endless_talks_are_broken(prepare, wide, tmp_path):
    with pytest.raises(BrokenSample, match="gone.png"):
        prepare()(replace(wide, target=tmp_path / "gone.png"), 0)
    with pytest.raises(BrokenSample, match="wide"):
        prepare()(replace(wide, target=b"no picture"), 0)
    talk = Sample("talk", "text", turns=(("user", "say it"), ("assistant", "a word " * 200)))
    with pytest.raises(BrokenSample, match=r"the conversation has \d+ tokens, loader.max_tokens is 100"):
        replace(prepare(), max_tokens=100)(talk, 0)
    assert any(prepare()(replace(talk, turns=(("user", "a"), ("assistant", "b"))), 0).learned)


def test_a_preparer_travels_to_worker_processes(prepare, wide, tmp_path):
    preparer = prepare(caches=(FeatureCache(tmp_path / "eva"), None), **{**AUGMENTED, "crop": "centre"})
    again = pickle.loads(pickle.dumps(preparer))
    assert digest(again, wide, range(5)) == digest(preparer, wide, range(5))


def test_pictures_for_the_vae_are_the_centre_square(tokenizer, tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (64, 32), (255, 0, 127)).save(stream, "PNG")
    sample = Sample("flat", "autoencode", target=stream.getvalue())
    picture = Preparer(tokenizer, Augmentation(), 0, eva_size=56, picture_size=16)(sample, 0).picture
    assert picture.shape == (3, 16, 16)
    torch.testing.assert_close(picture[:, 8, 8], torch.tensor([1.0, -1.0, 127 / 127.5 - 1]))
