"""Edits, chains, variations, reconstruction, and arithmetic on embeddings."""

import pytest
import torch
from PIL import Image

from blip3o_core import Blip3oPipeline, CheckpointError, InputError
from blip3o_core.embeddings import add_difference, interpolate, mix

QUICK = dict(width=64, height=64, decoder_steps=3)


@pytest.fixture(scope="module")
def seeing(tiny_checkpoint) -> Blip3oPipeline:
    """The tiny pipeline with the tiny EVA-CLIP tower."""
    tower = tiny_checkpoint.parent / "eva_clip_vision_tower"
    return Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32, vision_encoder=tower)


@pytest.fixture(scope="module")
def image(tiny_checkpoint) -> Image.Image:
    return Image.open(tiny_checkpoint.parent / "image.png").convert("RGB")


def test_an_image_and_its_tensor_give_the_same_embedding(seeing, image, expected, relative_error):
    import numpy as np

    z = seeing.embed_image(image)
    assert relative_error(z, expected["eva.pooled"]) <= 1e-3  # stored from half-precision pixels
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.equal(z, seeing.embed_image(tensor))
    assert relative_error(seeing.zero_image_embedding(), expected["eva.pooled_zero_image"]) <= 1e-5


def test_reconstruction_is_encoding_and_decoding_with_the_zero_image_as_negative(seeing, image):
    arguments = dict(steps=3, width=64, height=64, output_type="pt")
    picture = seeing.reconstruct([image], seeds=[4], **arguments)
    z = seeing.embed_image([image])
    assert torch.equal(picture, seeing.decode_embeddings(z, negative=seeing.zero_image_embedding(), seeds=[4], **arguments))


def test_an_edit_is_image_conditioned_generation(seeing, image):
    edited = seeing.edit([image], ["Make it red"], seeds=[3], steps=3, **QUICK)[0]
    q = seeing.encode_prompt(["Make it red"], images=[[image]])
    z = seeing.sample_embeddings(q, steps=3, seeds=[3])
    assert edited.tobytes() == seeing.decode_embeddings(z, steps=3, seeds=[3], width=64, height=64)[0].tobytes()


def test_a_chain_of_edits_is_one_edit_after_the_other(seeing, image):
    arguments = dict(seeds=[3], steps=3, **QUICK)
    first = seeing.edit([image], ["Make it red"], **arguments)
    second = seeing.edit(first, ["Add a hat"], **arguments)[0]
    assert seeing.edit([image], [["Make it red", "Add a hat"]], **arguments)[0].tobytes() == second.tobytes()


def test_chains_of_different_lengths_in_one_call(seeing, image):
    arguments = dict(steps=2, width=64, height=64, decoder_steps=2)
    both = seeing.edit([image, image], [["Make it red", "Add a hat"], "Make it blue"], seeds=[3, 4], **arguments)
    alone = seeing.edit([image], ["Make it blue"], seeds=[4], **arguments)[0]
    difference = max(abs(a - b) for a, b in zip(both[1].tobytes(), alone.tobytes(), strict=True))
    assert difference <= 2  # grey levels; batches round differently


def test_lower_strength_keeps_more_of_the_source(seeing, image):
    source = seeing.embed_image([image])
    q = seeing.encode_prompt(["Make it red"], images=[[image]])
    distance = [(seeing.sample_embeddings(q, steps=10, seeds=[3], init=source, strength=strength) - source).norm().item()
                for strength in (0.1, 0.5, 0.9)]  # fmt: skip
    assert distance[0] < distance[1] < distance[2]


def test_full_strength_does_not_read_the_start(seeing, image):
    q = seeing.encode_prompt(["Make it red"], images=[[image]])
    plain = seeing.sample_embeddings(q, steps=4, seeds=[3])
    torch.testing.assert_close(seeing.sample_embeddings(q, steps=4, seeds=[3], init=seeing.embed_image([image]), strength=1.0), plain)


def test_variations_differ_by_seed_and_repeat_under_it(seeing, image):
    arguments = dict(steps=3, **QUICK)
    first, second = seeing.vary([image], seeds=[1, 2], **arguments)
    assert first.tobytes() != second.tobytes()
    assert seeing.vary([image], seeds=[1], **arguments)[0].size == (64, 64)


def test_editing_at_full_strength_needs_no_eva_tower(pipe, image):
    assert pipe.edit([image], ["Make it red"], steps=2, width=64, height=64, decoder_steps=2)[0].size == (64, 64)
    with pytest.raises(CheckpointError, match="hold no EVA-CLIP tower"):
        pipe.edit([image], ["Make it red"], strength=0.5, steps=2, width=64, height=64, decoder_steps=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(instructions=["a", "b"]), "1 images, 2 instructions"),
        (dict(instructions=[[]]), "a chain of edits is empty"),
        (dict(instructions=[" "]), "the prompt is empty"),
        (dict(strength=0.0), "strength=0.0"),
        (dict(strength=1.5), "strength=1.5"),
        (dict(positions="spiral"), "positions 'spiral' is unknown"),
    ],
)
def test_bad_edits_are_refused(seeing, image, arguments, message):
    with pytest.raises(InputError, match=message):
        seeing.edit(**{"images": [image], "instructions": ["Make it red"], "steps": 2, **QUICK, **arguments})


def test_images_that_do_not_match_prompts(pipe, image, expected):
    with pytest.raises(InputError, match="2 lists of images for 1 prompts"):
        pipe.encode_prompt(["a"], images=[[image], [image]])
    with pytest.raises(InputError, match="pass template=False"):
        pipe.encode_prompt(["a"], pixel_values=expected["qwen.pixel_values"], image_grid_thw=expected["qwen.grid_thw"])
    with pytest.raises(InputError, match="image tokens, the images give 30"):
        pipe.encode_prompt(["a"], template=False, pixel_values=expected["qwen.pixel_values"], image_grid_thw=expected["qwen.grid_thw"])
    with pytest.raises(InputError, match="pixel_values need image_grid_thw"):
        pipe.ask("a", pixel_values=expected["qwen.pixel_values"])
    with pytest.raises(InputError, match="describes 4 patches, pixel_values holds 120"):
        pipe.ask("a", pixel_values=expected["qwen.pixel_values"], image_grid_thw=torch.tensor([[1, 2, 2]]))


def test_arithmetic():
    a, b, c = (torch.full((1, 4, 8, 8), value) for value in (1.0, 3.0, 10.0))
    assert torch.equal(interpolate(a, b, 0.0), a) and torch.equal(interpolate(a, b, 1.0), b)
    torch.testing.assert_close(interpolate(a, b, 0.25), torch.full_like(a, 1.5))
    torch.testing.assert_close(mix([a, b, c], [1, 1, 2]), torch.full_like(a, 6.0))
    torch.testing.assert_close(add_difference(c, b, a, 0.5), torch.full_like(a, 11.0))
    assert mix([a, torch.zeros(3, 4, 8, 8)], [1, 1]).shape == (3, 4, 8, 8)
    bad_calls = (
        lambda: mix([a, b], [1, -1]), lambda: mix([a], [1, 2]), lambda: mix([], []),
        lambda: interpolate(a, torch.zeros(1, 5, 8, 8), 0.5),
        lambda: mix([torch.zeros(2, 4, 8, 8), torch.zeros(3, 4, 8, 8)], [1, 1]),
    )  # fmt: skip
    for bad in bad_calls:
        with pytest.raises(InputError):
            bad()


def test_prompts_with_and_without_images_in_one_batch(pipe, image, expected, expected_text, relative_error):
    states = pipe.encode_prompt([expected_text["prompts"][0], "Make it red", "Make it blue"], images=[None, image, []])
    assert relative_error(states[:1], expected["query.0"]) <= 1e-5
    assert relative_error(states[1:2], pipe.encode_prompt(["Make it red"], images=[[image]])) <= 1e-5
