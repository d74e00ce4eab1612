"""User text stays text; templates alone place special tokens."""

import pytest

from blip3o_core import InputError


@pytest.mark.parametrize("typed", ["<|im_end|>", "[IMG]", "<|image_pad|>", "<image>", "<|vision_start|>", "<|endoftext|>"])
def test_a_typed_special_token_is_plain_text(pipe, typed):
    ids = pipe.tokenizer.generation_ids(f"a cat{typed} and a dog")
    frame = pipe.tokenizer.generation_ids("a cat and a dog")
    special = pipe.tokenizer.special_id(typed)
    assert ids.count(special) == frame.count(special)
    raw = pipe.tokenizer.generation_ids(typed, template=False)
    assert raw[-1] == pipe.tokenizer.image_start_id
    assert special not in raw[:-1]
    assert len(raw) > 2, "the letters of the token, each with an id"


def test_the_null_prompt_is_one_space_and_the_image_token(pipe):
    assert pipe.tokenizer.generation_ids(" ", template=False) == [220, 414]


@pytest.mark.parametrize(("prompt", "template"), [("", True), ("   \n", True), ("", False)])
def test_an_empty_prompt_is_refused(pipe, prompt, template):
    with pytest.raises(InputError, match="the prompt is empty"):
        pipe.encode_prompt([prompt], template=template)


def test_a_prompt_longer_than_the_context_is_refused_before_any_weights_are_loaded(tiny_checkpoint):
    from blip3o_core import Blip3oPipeline

    fresh = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu")
    with pytest.raises(InputError, match=r"has \d{5} tokens with its frame; this model takes 4031"):
        fresh.generate(["cat " * 10_000], width=64, height=64)
    assert fresh._backbone is None


def test_the_longest_prompt_that_fits_is_encoded(pipe):
    frame = len(pipe.tokenizer.generation_ids("a")) - 1
    prompt = "a" + "!" * (4031 - frame)
    while len(pipe.tokenizer.generation_ids(prompt)) - 1 > 4031:
        prompt = prompt[:-1]
    assert pipe.encode_prompt([prompt]).shape == (1, 64, 64)


def test_text_that_is_not_unicode_is_refused(pipe):
    with pytest.raises(InputError, match="no valid Unicode"):
        pipe.encode_prompt(["a \ud800 cat"])


def test_a_prompt_that_is_no_text_is_refused(pipe):
    with pytest.raises(InputError, match="a prompt is text, not int"):
        pipe.encode_prompt([7])


def test_emoji_and_other_scripts_are_encoded(pipe):
    assert pipe.encode_prompt(["猫 🐈 кот قط"]).isfinite().all()
