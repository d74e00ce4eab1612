"""Images in prompts and written text, against the original implementation, float32 on CPU.

Beside each tolerance: measured with the newest packages / with the floor versions.
"""

import numpy as np
import pytest
import torch
from PIL import Image

QUESTION = "Describe the image."
TEXT_QUESTION = "Please generate image based on the following caption: A photo of cute cat"


@pytest.fixture(scope="module")
def preprocessed(expected):
    return {"pixel_values": expected["qwen.pixel_values"], "image_grid_thw": expected["qwen.grid_thw"]}


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    from skimage import data

    return Image.fromarray(data.astronaut())


def test_query_states_of_an_edit(pipe, expected, expected_text, preprocessed, relative_error):
    states = pipe.encode_prompt([expected_text["edit_text"]], template=False, **preprocessed)
    assert relative_error(states, expected["query.edit"]) <= 1e-5  # measured 4.4e-7 / 4.0e-7


def test_the_edit_template_gives_the_text_of_the_reference(pipe, expected_text):
    instruction = expected_text["edit_text"].split("<|vision_end|>")[1].split("<|im_end|>")[0]
    ids = pipe.tokenizer.generation_ids(instruction, image_tokens=[30])
    assert ids == [*pipe.tokenizer.trusted_ids(expected_text["edit_text"]), pipe.tokenizer.image_start_id]


def test_logits_and_greedy_text_about_an_image(pipe, expected, expected_text, preprocessed, relative_error):
    logits = []
    handle = pipe.output_head.register_forward_hook(lambda module, args, output: logits.append(output))
    try:
        ids = pipe.ask(QUESTION, max_new_tokens=24, return_ids=True, **preprocessed)
    finally:
        handle.remove()
    assert relative_error(logits[0], expected["understand.last_logits"]) <= 1e-4  # measured 3.5e-7 / 4.0e-7
    assert ids == expected_text["understand_greedy_ids"]


def test_greedy_text_about_text(pipe, expected_text):
    assert pipe.ask(TEXT_QUESTION, max_new_tokens=24, return_ids=True) == expected_text["text_greedy_ids"]


def test_our_preprocessing_in_the_same_question(pipe, expected_text):
    image = Image.open(__file__.replace("parity/test_understanding.py", "data/sdxl/image.png"))
    ids = pipe.ask(QUESTION, [image], min_pixels=3136, max_pixels=28224, max_new_tokens=24, return_ids=True)
    assert ids == expected_text["understand_greedy_ids"]


@torch.inference_mode()
def test_two_images_in_one_prompt_equal_a_single_forward_built_by_hand(pipe, photograph, relative_error):
    """The same sequence assembled without our batching: features concatenated in order, one row, no padding."""
    from blip3o_core.images import qwen_pixel_values

    images = [photograph, Image.fromarray(np.array(photograph)[::-1].copy())]
    states = pipe.encode_prompt(["Blend them", "a longer text about one picture"], images=[images, images[:1]])

    pixel_values, grid = qwen_pixel_values(images, size=(448, 448))
    features = pipe.vision_tower(pixel_values, grid)
    assert features.shape == (512, 64)
    text = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
            + ("<|vision_start|>" + "<|image_pad|>" * 256 + "<|vision_end|>") * 2
            + "Blend them<|im_end|>\n<|im_start|>assistant\n[IMG]")  # fmt: skip
    ids = torch.tensor(pipe.tokenizer.trusted_ids(text))
    row = pipe.backbone.language_model.embed_tokens(ids)
    row[ids == pipe.tokenizer.image_pad_id] = features
    row = torch.cat((row, pipe.backbone.latent_queries[0]))[None]
    by_hand = pipe.backbone.language_model(inputs_embeds=row, use_cache=False).last_hidden_state[:, -64:]
    assert relative_error(states[:1], by_hand) <= 1e-5  # measured 0


@torch.inference_mode()
def test_mrope_positions_of_queries_equal_positions_of_understanding(pipe, photograph, relative_error):
    """`positions="mrope"` numbers the prompt as transformers does for the same tokens."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    from blip3o_core.models.qwen_positions import multimodal_positions

    grid = torch.tensor([[1, 10, 12]])
    ids = pipe.tokenizer.generation_ids("Make it red", image_tokens=[30])
    positions, following = multimodal_positions(ids, pipe.tokenizer.image_pad_id, [(1, 5, 6)])

    class Config:
        image_token_id, video_token_id, vision_start_token_id = pipe.tokenizer.image_pad_id, 413, 409
        vision_config = pipe.vision_tower.network.config

    holder = type("Holder", (), {"config": Config, "spatial_merge_size": 2, "get_vision_position_ids": None})()
    if hasattr(Qwen2_5_VLModel, "get_vision_position_ids"):  # transformers 5 splits the function
        holder.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(holder)
        types = torch.tensor([[int(token == Config.image_token_id) for token in ids]])
        reference, delta = Qwen2_5_VLModel.get_rope_index(holder, torch.tensor([ids]), mm_token_type_ids=types, image_grid_thw=grid)
    else:
        reference, delta = Qwen2_5_VLModel.get_rope_index(holder, torch.tensor([ids]), image_grid_thw=grid)
    assert torch.equal(positions, reference[:, 0])
    assert following == len(ids) + int(delta)
    plain, mrope = (pipe.encode_prompt(["Make it red"], images=[photograph], positions=name) for name in ("arange", "mrope"))
    assert relative_error(mrope, plain) > 1e-2, "the two must differ, or the option does nothing"
