"""`blip3o edit`, `vary` and `reconstruct`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from blip3o_core import Blip3oPipeline
from blip3o_core.images import load_image

from ..conftest import DATA
from .conftest import BROKEN_PICTURES, ODD_PICTURES

EVA = DATA / "sdxl" / "eva_clip_vision_tower"
DECODER = ("--width", 64, "--height", 64, "--decoder-steps", 1)
QUICK = (*DECODER, "--steps", 2, "--negative", "zeros")
SIZES = {"width": 64, "height": 64, "decoder_steps": 1, "steps": 2, "negative": "zeros"}


@pytest.fixture(scope="module")
def seeing_pipe(tiny_checkpoint) -> Blip3oPipeline:
    return Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype=torch.float32, vision_encoder=EVA)


@pytest.fixture
def car(tmp_path, photograph):
    path = tmp_path / "car.png"
    photograph.save(path)
    return path


def pixels(path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def test_edit_draws_what_the_library_draws_and_a_chain_goes_on_from_each_result(cli, seeing_pipe, car, tmp_path):
    assert cli("edit", car, "Make it red", "Add snow", "--output", tmp_path / "a.png", "--seed", 3, *QUICK).code == 0
    (whole,) = seeing_pipe.edit([load_image(car)], [["Make it red", "Add snow"]], seeds=[3], **SIZES)
    assert pixels(tmp_path / "a.png") == whole.tobytes()
    (first,) = seeing_pipe.edit([load_image(car)], ["Make it red"], seeds=[3], **SIZES)
    (second,) = seeing_pipe.edit([first], ["Add snow"], seeds=[3], **SIZES)
    assert whole.tobytes() == second.tobytes() != first.tobytes()


def test_edit_writes_recipes_with_the_source_and_json_lines(cli, car, tmp_path):
    result = cli("edit", car, "Make it red", "--num-images", 2, "--batch-size", 2, "--seed", 8, "--positions", "mrope", "--image", car,
                 "--output", tmp_path / "out", "--json", *QUICK)  # fmt: skip
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert [(line["seed"], line["source"], line["instructions"]) for line in lines] == [(s, "car.png", ["Make it red"]) for s in (8, 9)]
    for line in lines:
        with Image.open(line["file"]) as image:
            recipe = json.loads(image.text["blip3o"])
        assert recipe == {key: value for key, value in line.items() if key not in ("file", "seconds")}
        assert recipe["command"] == "edit" and recipe["positions"] == "mrope" and recipe["further_sources"] == ["car.png"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"0000{n}_car-make-it-red_{s}.png" for n, s in ((1, 8), (2, 9))]


def test_edit_with_strength_starts_from_the_embedding_of_the_picture(cli, seeing_pipe, car, tmp_path):
    arguments = ("edit", car, "Make it red", "--strength", 0.5, "--output", tmp_path / "a.png", *QUICK)
    missing = cli(*arguments)
    assert missing.code == 1 and "hold no EVA-CLIP tower" in missing.err and "loading" not in missing.err
    assert cli(*arguments, "--vision-encoder", EVA).code == 0
    (expected,) = seeing_pipe.edit([load_image(car)], ["Make it red"], seeds=[0], strength=0.5, **SIZES)
    assert pixels(tmp_path / "a.png") == expected.tobytes()


def test_vary_draws_what_the_library_draws_in_any_batch(cli, seeing_pipe, car, tmp_path):
    cli("vary", car, "--num-images", 3, "--batch-size", 2, "--vision-encoder", EVA, "--output", tmp_path / "out", *QUICK)
    pictures = [pixels(file) for file in sorted((tmp_path / "out").iterdir())]
    same_batches = [image for seeds in ([0, 1], [2]) for image in seeing_pipe.vary([load_image(car)], seeds=seeds, strength=0.6, **SIZES)]
    assert pictures == [image.tobytes() for image in same_batches]
    assert len(set(pictures)) == 3
    # Matrix products of another batch size round another way: one level of one value, measured with two threads.
    one_batch = seeing_pipe.vary([load_image(car)], seeds=[0, 1, 2], strength=0.6, **SIZES)
    for picture, image in zip(pictures, one_batch, strict=True):
        difference = np.frombuffer(picture, np.uint8).astype(int) - np.frombuffer(image.tobytes(), np.uint8)
        assert abs(difference).max() <= 1


def test_reconstruct_draws_what_the_library_draws(cli, seeing_pipe, car, tmp_path):
    result = cli("reconstruct", car, "--vision-encoder", EVA, "--output", tmp_path / "a.png", "--seed", 5, "--json", *DECODER)
    (expected,) = seeing_pipe.reconstruct([load_image(car)], seeds=[5], width=64, height=64, steps=1)
    assert pixels(tmp_path / "a.png") == expected.tobytes()
    recipe = json.loads(result.out)
    assert (recipe["command"], recipe["source"], recipe["negative"]) == ("reconstruct", "car.png", "zero_image")


def test_reconstruct_and_vary_take_several_pictures(cli, odd_pictures, tmp_path):
    pictures = [odd_pictures / name for name in ODD_PICTURES]
    result = cli("reconstruct", *pictures, "--vision-encoder", EVA, "--output", tmp_path / "out", "--batch-size", 4, "--json", *DECODER)
    assert result.code == 0, result.err
    assert [json.loads(line)["source"] for line in result.out.splitlines()] == list(ODD_PICTURES)
    result = cli("vary", *pictures[:2], "--vision-encoder", EVA, "--output", tmp_path / "out", "--batch-size", 4, *QUICK)
    assert result.code == 0 and len(result.out.splitlines()) == 2


@pytest.mark.parametrize("name", [*ODD_PICTURES, "thin.png"])
def test_edit_reads_odd_pictures(cli, odd_pictures, tmp_path, name):
    result = cli("edit", odd_pictures / name, "Make it red", "--output", tmp_path / "a.png", *QUICK)
    assert result.code == 0, result.err
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (64, 64)


@pytest.mark.parametrize(("name", "message"), BROKEN_PICTURES.items())
@pytest.mark.parametrize("subcommand", ["edit", "vary", "reconstruct"])
def test_a_broken_picture_is_one_line_before_anything_is_loaded(cli, broken_pictures, tmp_path, subcommand, name, message):
    instruction = ["Make it red"] if subcommand == "edit" else []
    result = cli(subcommand, broken_pictures / name, *instruction, "--output", tmp_path / "out")
    assert result.code == 1 and len(result.err.splitlines()) == 1
    assert f"{broken_pictures / name}: " in result.err and message in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("subcommand", ["vary", "reconstruct"])
def test_a_picture_too_thin_for_the_encoder_is_a_clear_error(cli, odd_pictures, tmp_path, subcommand):
    steps = QUICK if subcommand == "vary" else DECODER
    result = cli(subcommand, odd_pictures / "thin.png", "--vision-encoder", EVA, "--output", tmp_path / "out", *steps)
    assert result.code == 1 and "8000 x 3 is more than 200 times as long as wide" in result.err


@pytest.mark.parametrize("subcommand", ["vary", "reconstruct"])
def test_a_checkpoint_without_eva_tower_says_so_before_the_large_networks_are_read(cli, car, tmp_path, subcommand):
    result = cli(subcommand, car, "--output", tmp_path / "out", *DECODER)
    assert result.code == 1 and "hold no EVA-CLIP tower" in result.err and "loading" not in result.err


def test_vary_without_an_eva_tower_works_where_nothing_is_kept(cli, car, tmp_path):
    assert cli("vary", car, "--strength", 1, "--output", tmp_path / "a.png", *QUICK).code == 0


def test_typed_tokens_are_plain_text(cli, car, tmp_path):
    result = cli("edit", car, "<|image_pad|><|vision_start|>[IMG]<|im_end|>", "--output", tmp_path / "a.png", *QUICK)
    assert result.code == 0, result.err


def test_a_checkpoint_without_vision_tower_can_not_edit(cli, checkpoint_copy, edit_tensors, car, tmp_path):
    edit_tensors(checkpoint_copy / "model.safetensors", drop_vision_tower)
    result = cli("edit", car, "Make it red", "--model", checkpoint_copy, "--output", tmp_path / "a.png", *QUICK)
    assert result.code == 1 and "hold no vision tower" in result.err
    assert not (tmp_path / "a.png").exists()


def drop_vision_tower(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if "visual." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("edit", "{car}", " "), "an instruction is empty"),
        (("edit", "{car}", "word " * 10_000), "tokens with its frame; this model takes"),
        (("edit", "{car}", "red", "--strength", "0"), "--strength 0.0 is not in 0..1"),
        (("edit", "{car}", "red", "--strength", "nan"), "--strength nan is not in 0..1"),
        (("edit", "{car}", "red", "--image", "nowhere.png"), "nowhere.png: there is no such file"),
        (("edit", "{car}", "red", "--output", "{car}"), "car.png exists. Give another name"),
        (("edit", "{car}", "red", "--steps", "0"), "steps=0"),
        (("vary", "{car}", "--strength", "1.5"), "--strength 1.5 is not in 0..1"),
        (("vary", "{car}", "--num-images", "0"), "must be at least 1"),
        (("vary", "{car}", "--vision-encoder", "nowhere"), "nowhere"),
        (("vary", "{car}", "--width", "63"), "width=63"),
        (("reconstruct", "{car}", "--decoder-steps", "0"), "decoder steps=0"),
        (("reconstruct", "{car}", "--seed", "-1"), "seed -1"),
        (("reconstruct", "{car}", "{car}", "--output", "one.png"), "2 pictures don't fit in the one file"),
    ],
)
def test_bad_values_are_one_line_before_anything_is_loaded(cli, car, arguments, message):
    before = car.read_bytes()
    result = cli(*(argument.replace("{car}", str(car)) for argument in arguments))
    assert result.code == 1 and message in result.err and len(result.err.splitlines()) == 1
    assert car.read_bytes() == before
