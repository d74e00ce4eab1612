"""The command as a user runs it: in a process of its own."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from PIL import Image

from ..conftest import command, command_environment

QUICK = ("--width", 64, "--height", 64, "--steps", 2, "--decoder-steps", 2, "--device", "cpu")


def test_help_teaches_by_example_and_answers_at_once(blip3o):
    began = time.monotonic()
    result = blip3o("--help", check=True)
    assert time.monotonic() - began < 2, "torch must not be imported for --help"
    assert "example:" in result.stdout
    for subcommand in ("generate", "edit", "vary", "reconstruct", "ask", "chat", "caption", "inspect"):
        assert "examples:" in blip3o(subcommand, "--help", check=True).stdout


def test_the_same_seed_gives_the_same_bytes_of_pixels(blip3o, tiny_checkpoint, tmp_path):
    for name in ("a.png", "b.png"):
        blip3o("generate", "a cat", "--model", tiny_checkpoint, "--output", tmp_path / name, "--seed", 7,
               "--width", 64, "--height", 64, "--device", "cpu", check=True)  # fmt: skip
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_the_command_and_the_library_draw_the_same_picture(blip3o, pipe, tiny_checkpoint, tmp_path):
    blip3o("generate", "a cat", "--model", tiny_checkpoint, "--output", tmp_path / "a.png", "--seed", 7, *QUICK, check=True)
    picture = pipe.generate(["a cat"], seeds=[7], width=64, height=64, steps=2, decoder_steps=2)[0]
    assert Image.open(tmp_path / "a.png").tobytes() == picture.tobytes()


def test_json_lines_and_recipes_in_the_pictures(blip3o, tiny_checkpoint, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("ein Käfer\n\n  a dog  \n", "utf-8")
    result = blip3o("generate", "a cat", "--prompts", prompts, "--num-images", 2, "--seed", 5, "--batch-size", 4, "--json",
                    "--output", tmp_path / "out", *QUICK, check=True, BLIP3O_MODEL=str(tiny_checkpoint))  # fmt: skip
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        ("a cat", 5), ("a cat", 6), ("ein Käfer", 5), ("ein Käfer", 6), ("a dog", 5), ("a dog", 6),
    ]  # fmt: skip
    for line in lines:
        recipe = json.loads(Image.open(line["file"]).text["blip3o"])
        assert recipe == {key: value for key, value in line.items() if key not in ("file", "seconds")}
        assert recipe["steps"] == 2 and recipe["dtype"] == "float32" and recipe["negative"] == "null_prompt"
    assert len({line["file"] for line in lines}) == 6
    assert "step/s" in result.stderr, "progress shows a rate"


def test_a_folder_is_filled_up_and_never_overwritten(blip3o, tiny_checkpoint, tmp_path):
    for _ in range(2):
        blip3o("generate", "a cat", "--model", tiny_checkpoint, "--output", tmp_path, *QUICK, check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00001_a-cat_0.png", "00002_a-cat_0.png"]


def test_a_file_is_only_replaced_when_asked(blip3o, tiny_checkpoint, tmp_path):
    file = tmp_path / "a.png"
    file.write_bytes(b"precious")
    refused = blip3o("generate", "a cat", "--model", tiny_checkpoint, "--output", file, *QUICK)
    assert refused.returncode == 1 and "exists. Give another name, or --overwrite" in refused.stderr
    assert file.read_bytes() == b"precious"
    blip3o("generate", "a cat", "--model", tiny_checkpoint, "--output", file, "--overwrite", *QUICK, check=True)
    assert Image.open(file).size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no prompt was given"),
        ((" ",), "the prompt is empty"),
        (("word " * 10_000,), "tokens with its frame; this model takes"),
        (("a", "--prompts", "nowhere.txt"), "nowhere.txt: can't be read"),
        (("a", "b", "--output", "one.png"), "2 pictures don't fit in the one file"),
        (("a", "--output", "one.jpg"), "pictures are written as .png"),
        (("a", "--steps", "0"), "steps=0"),
        (("a", "--seed", "-1"), "seed -1"),
        (("a", "--num-images", "0"), "must be at least 1"),
        (("a", "--width", "63"), "width=63"),
        (("a", "--device", "cuda:99"), "can't be used here"),
        (("a", "--model", "nowhere"), "no such folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(blip3o, tiny_checkpoint, tmp_path, arguments, message):
    result = blip3o("generate", *arguments, cwd=tmp_path, BLIP3O_MODEL=str(tiny_checkpoint))
    assert result.returncode == 1
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_nan_weights_are_one_line_and_no_picture(blip3o, checkpoint_copy, edit_tensors, tmp_path):
    def damage(tensors):
        tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")

    edit_tensors(checkpoint_copy / "model.safetensors", damage)
    result = blip3o("generate", "a cat", "--model", checkpoint_copy, "--output", tmp_path / "out", *QUICK)
    assert result.returncode == 1
    assert "model.layers.0.mlp.up_proj.weight holds nan" in result.stderr and "Traceback" not in result.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_a_place_that_can_not_be_written(blip3o, tiny_checkpoint, tmp_path):
    (tmp_path / "file").write_text("x")
    result = blip3o("generate", "a cat", "--model", tiny_checkpoint, "--output", tmp_path / "file" / "deeper", *QUICK)
    assert result.returncode == 1 and "can't write there" in result.stderr


def test_ctrl_c_while_drawing_keeps_what_is_finished_and_leaves_nothing_half_written(tiny_checkpoint, tmp_path):
    arguments = ("generate", "a cat", "--num-images", 500, "--model", tiny_checkpoint, "--output", tmp_path, *QUICK)
    process = subprocess.Popen(command(*arguments), env=command_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().endswith(".png\n"), process.stderr.read()
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "finished files are kept" in stderr
    files = list(tmp_path.iterdir())
    assert 1 <= len(files) < 500
    for file in files:
        Image.open(file).load()  # whole


def test_kill_9_while_drawing_leaves_no_damaged_picture(tiny_checkpoint, tmp_path):
    arguments = ("generate", "a cat", "--num-images", 500, "--model", tiny_checkpoint, "--output", tmp_path, *QUICK)
    process = subprocess.Popen(command(*arguments), env=command_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for _ in range(5):
        assert process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    process.stdout.close()
    pictures = list(tmp_path.glob("*.png"))
    assert len(pictures) >= 5
    for file in pictures:
        Image.open(file).load()


def test_inspect_counts_what_each_task_loads(blip3o, tiny_checkpoint):
    description = json.loads(blip3o("inspect", tiny_checkpoint, "--json", check=True).stdout)
    parts = description["components"]
    assert parts["dit"]["parameters"] == 218_748 and parts["dit"]["dtypes"] == ["float32"]
    drawn = description["tasks"]["text to image"]
    assert "output_head" not in drawn["components"] and "vision_tower" not in drawn["components"]
    assert drawn["bytes"] == sum(parts[name]["bytes"] for name in ("language_model", "queries", "dit", "decoder_unet", "decoder_vae"))
    assert description["tasks"]["reconstruction"]["missing"] == ["vision_encoder"]
    table = blip3o("inspect", tiny_checkpoint, check=True).stdout
    assert "text to image" in table and "218,748" in table


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("Tried to allocate 8 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError(),
], ids=["device", "cpu", "python"])  # fmt: skip
def test_out_of_memory_names_the_cheaper_options(monkeypatch, tiny_checkpoint, tmp_path, capsys, error):
    from blip3o_core.cli.main import main
    from blip3o_core.models.sdxl import SdxlDecoder

    def exhausted(*_, **__):
        raise error

    monkeypatch.setattr(SdxlDecoder, "sample_latents", exhausted)
    code = main(["generate", "a cat", "--model", str(tiny_checkpoint), "--output", str(tmp_path), *map(str, QUICK)])
    assert code == 1
    assert "out of memory on cpu" in capsys.readouterr().err
