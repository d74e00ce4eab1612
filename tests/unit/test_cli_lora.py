"""`--lora` and `blip3o lora`, as typed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blip3o_core.cli.main import build_parser, main
from blip3o_core.cli.options import lora_choice
from blip3o_core.lora.apply import for_host
from blip3o_core.lora.files import read_lora, write_lora
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from .lora_samples import random_lora

QUICK = ("--steps", 2, "--decoder-steps", 2, "--width", 64, "--height", 64)


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Blip3oCheckpoint:
    return Blip3oCheckpoint.open(tiny_checkpoint)


@pytest.fixture
def fox(checkpoint, tmp_path) -> Path:
    """A LoRA of all parts."""
    write_lora(tmp_path / "fox.safetensors", random_lora(checkpoint))
    return tmp_path / "fox.safetensors"


@pytest.fixture
def lora(capsys) -> Callable[..., tuple[int, str, str]]:
    """lora("inspect", file): runs `blip3o lora`, -> status, stdout, stderr."""

    def run(*args: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["lora", *map(str, args)])
        return (code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(("text", "expected"), [
    ("fox.safetensors", ("fox.safetensors", 1.0)), ("fox.safetensors:0.8", ("fox.safetensors", 0.8)), ("fox:-1", ("fox", -1.0)),
    ("C:\\loras\\fox.safetensors", ("C:\\loras\\fox.safetensors", 1.0)), ("C:\\fox.safetensors:.5", ("C:\\fox.safetensors", 0.5)),
    ("a:b.safetensors", ("a:b.safetensors", 1.0)), ("a:2:0.5", ("a:2", 0.5)), ("fox.safetensors:nan", ("fox.safetensors:nan", 1.0)),
    ("fox.safetensors:inf", ("fox.safetensors:inf", 1.0)), (":0.5", (":0.5", 1.0)), ("fox.safetensors:", ("fox.safetensors:", 1.0)),
])  # fmt: skip
def test_a_number_behind_the_last_colon_is_the_strength(text, expected):
    assert lora_choice(text) == (Path(expected[0]), expected[1])


def test_a_file_whose_name_ends_in_a_number_is_that_file(tmp_path):
    (tmp_path / "take:2").write_text("")
    assert lora_choice(f"{tmp_path}/take:2") == (tmp_path / "take:2", 1.0)
    assert lora_choice(f"{tmp_path}/take:2:3") == (tmp_path / "take:2", 3.0)


def test_every_command_that_draws_or_answers_takes_loras():
    for arguments in (["generate", "x"], ["edit", "a", "x"], ["vary", "a"], ["chat"], ["ask", "x"], ["caption", "a"]):
        args = build_parser().parse_args([*arguments, "--lora", "a.safetensors:2", "--lora", "b.safetensors", "--lora-any-base"])
        assert args.lora == [(Path("a.safetensors"), 2.0), (Path("b.safetensors"), 1.0)] and args.lora_any_base
        assert build_parser().parse_args(arguments).lora == []
    with pytest.raises(SystemExit):
        build_parser().parse_args(["reconstruct", "a", "--lora", "a.safetensors"])


def test_a_lora_changes_the_picture_and_stands_in_its_recipe(cli, fox, tmp_path):
    for name, options in (("plain", ()), ("off", ("--lora", f"{fox}:0")), ("on", ("--lora", f"{fox}:0.8"))):
        result = cli("generate", "a cat", *options, *QUICK, "--output", tmp_path / f"{name}.png")
        assert result.code == 0, result.err
    plain, off, on = (Image.open(tmp_path / f"{name}.png") for name in ("plain", "off", "on"))
    assert plain.tobytes() == off.tobytes() != on.tobytes()
    assert json.loads(on.text["blip3o"])["loras"] == "fox.safetensors:0.8"
    assert "loras" not in json.loads(plain.text["blip3o"])


def test_a_lora_of_the_language_model_changes_an_answer(cli, fox):
    answers = [json.loads(cli("ask", "What is this?", "--max-new-tokens", 8, "--json", *options).out)
               for options in ((), ("--lora", f"{fox}:5"))]  # fmt: skip
    assert answers[0]["answer"] != answers[1]["answer"]
    assert answers[1]["settings"]["loras"] == "fox.safetensors:5"


def test_a_lora_of_another_base_is_refused_unless_it_is_allowed(cli, fox, tmp_path):
    other = read_lora(fox)
    other.metadata["blip3o.base_fingerprint"], other.metadata["blip3o.base_model"] = "0" * 16, "BLIP3o-Model-8B"
    write_lora(fox, other)
    refused = cli("generate", "a cat", "--lora", fox, *QUICK, "--output", tmp_path / "a.png")
    assert refused.code == 1
    assert "trained on BLIP3o-Model-8B (0000000000000000), this is checkpoint (" in refused.err and "--lora-any-base" in refused.err
    assert cli("generate", "a cat", "--lora", fox, "--lora-any-base", *QUICK, "--output", tmp_path / "a.png").code == 0


@pytest.mark.parametrize(("name", "message"), [("missing.safetensors:0.8", "missing.safetensors: the file is missing"),
                                               ("cut.safetensors", "cut off"), ("model.safetensors", "no BLIP3-o LoRA has")])  # fmt: skip
def test_bad_files_are_named(cli, fox, tiny_checkpoint, name, message):
    (fox.parent / "cut.safetensors").write_bytes(fox.read_bytes()[:-10])
    (fox.parent / "model.safetensors").write_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    result = cli("generate", "a cat", "--lora", fox.parent / name, "--output", fox.parent / "a.png")
    assert result.code == 1 and message in result.err and "Traceback" not in result.err


def test_inspect_tells_what_a_file_holds(lora, fox, checkpoint):
    code, out, _ = lora("inspect", fox, "--json")
    found = json.loads(out)
    assert code == 0 and found["metadata"]["blip3o.base_fingerprint"] == checkpoint.fingerprint
    dit, language_model, queries = (found["components"][name] for name in ("dit", "language_model", "latent_queries"))
    assert (dit["layers"], dit["ranks"], dit["alphas"], dit["dora"]) == (30, [2, 4], [3, 7], False)
    assert (language_model["layers"], queries["parameters"]) == (12, 64 * 64)
    file = read_lora(fox)
    assert dit["parameters"] == sum(adapter.down.numel() + adapter.up.numel() for adapter in file.adapters["dit"].values())
    expected = sum(adapter.delta().double().square().sum() for adapter in file.adapters["dit"].values()) ** 0.5
    assert dit["norm"] == pytest.approx(expected.item(), rel=1e-5)
    code, out, _ = lora("inspect", fox)
    assert code == 0 and "language_model        12" in out and "modelspec.trigger_phrase = xyz style" in out


def test_convert_goes_both_ways_and_overwrites_nothing(lora, fox, tmp_path):
    assert lora("convert", fox, tmp_path / "folder")[:2] == (0, f"{tmp_path / 'folder'}\n")
    assert lora("convert", tmp_path / "folder", tmp_path / "again.safetensors")[0] == 0
    assert (tmp_path / "again.safetensors").read_bytes() == fox.read_bytes()
    for source, output in ((fox, tmp_path / "folder"), (tmp_path / "folder", fox)):
        code, _, err = lora("convert", source, output)
        assert code == 1 and "--overwrite" in err
        assert lora("convert", source, output, "--overwrite")[0] == 0
    assert lora("convert", tmp_path / "folder", tmp_path / "a.bin")[0] == 1
    assert lora("convert", tmp_path / "nothing.safetensors", tmp_path / "b")[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "folder", "fox.safetensors"]


def test_convert_turns_dora_for_comfyui_into_that_of_peft_with_the_base(lora, checkpoint, tiny_checkpoint, tmp_path):
    own = random_lora(checkpoint, parts=["dit"], dora=True)
    write_lora(tmp_path / "host.safetensors", for_host(own, {"dit": checkpoint.load_dit(dtype=torch.float32)}))
    code, _, err = lora("convert", tmp_path / "host.safetensors", tmp_path / "folder")
    assert code == 1 and "--model" in err
    assert lora("convert", tmp_path / "host.safetensors", tmp_path / "folder", "--model", tiny_checkpoint)[0] == 0
    tensors = load_file(tmp_path / "folder" / "adapter_model.safetensors")
    for path, adapter in own.adapters["dit"].items():
        torch.testing.assert_close(tensors[f"base_model.model.{path}.lora_magnitude_vector"], adapter.magnitude, rtol=1e-6, atol=0)


def test_a_merged_checkpoint_draws_what_the_lora_draws(lora, cli, fox, tiny_checkpoint, tmp_path):
    plain = read_lora(fox)
    plain.differences["dit"] = {"layers.0.norm2.weight": torch.full((48,), 0.3)}
    write_lora(tmp_path / "second.safetensors", plain)
    chosen = (f"{fox}:0.8", f"{tmp_path / 'second.safetensors'}:-0.3")
    code, out, err = lora("merge", tiny_checkpoint, *chosen, "--output", tmp_path / "merged")
    assert (code, out) == (0, f"{tmp_path / 'merged'}\n"), err
    for name, options in (("merged", ("--model", tmp_path / "merged")), ("added", ("--lora", chosen[0], "--lora", chosen[1]))):
        result = cli("generate", "a cat", *options, *QUICK, "--output", tmp_path / f"{name}.png")
        assert result.code == 0, result.err
    assert Image.open(tmp_path / "merged.png").tobytes() == Image.open(tmp_path / "added.png").tobytes()
    shard = load_file(tmp_path / "merged" / "model-updated-00001-of-00001.safetensors")
    assert len(shard) == 30 + 12 + 1 + 1  # both networks, the queries, a norm
    code, _, err = lora("merge", tiny_checkpoint, fox, "--output", tmp_path / "merged")
    assert code == 1 and "exists and is not empty" in err
    assert lora("merge", tiny_checkpoint, fox, "--output", tmp_path / "merged", "--overwrite")[0] == 0


def test_merging_into_quantised_weights_is_refused(lora, fox, checkpoint_copy, edit_tensors, tmp_path):
    name = "model.dit.model.layers.0.attn1.to_q.weight"
    edit_tensors(checkpoint_copy / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(torch.float8_e4m3fn)}))
    code, _, err = lora("merge", checkpoint_copy, fox, "--output", tmp_path / "merged")
    assert code == 1 and f"1 of the weights to change are quantised, first {name}" in err
    assert not (tmp_path / "merged").exists()


def test_resize_writes_a_smaller_file_and_says_what_is_kept(lora, fox, tmp_path):
    small = tmp_path / "small.safetensors"
    code, out, _ = lora("resize", fox, "--rank", 2, "--output", small)
    assert code == 0
    kept = float(out.split("keeps ")[1].split("%")[0])
    assert 70 < kept < 99
    assert {adapter.rank for adapter in read_lora(small).all_adapters} == {2}
    assert small.stat().st_size < 0.7 * fox.stat().st_size
    code, _, err = lora("resize", fox, "--rank", 2, "--output", small)
    assert code == 1 and f"{small} exists" in err
    code, _, err = lora("resize", fox, "--rank", 5, "--output", tmp_path / "large.safetensors")
    assert code == 1 and "rank 5 is not in 1..4" in err


def test_a_file_that_is_no_lora_is_named_by_every_command(lora, tiny_checkpoint, tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "x.safetensors")
    for command in (("inspect", tmp_path / "x.safetensors"), ("convert", tmp_path / "x.safetensors", tmp_path / "y"),
                    ("resize", tmp_path / "x.safetensors", "--rank", 1, "--output", tmp_path / "y.safetensors"),
                    ("merge", tiny_checkpoint, tmp_path / "x.safetensors", "--output", tmp_path / "y")):  # fmt: skip
        code, out, err = lora(*command)
        assert (code, out) == (1, "") and "x.safetensors: holds 1 tensors that no BLIP3-o LoRA has: x" in err
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_the_help_of_every_command_has_examples(blip3o):
    for command in ("inspect", "convert", "merge", "resize"):
        result = blip3o("lora", command, "--help")
        assert result.returncode == 0 and f"blip3o lora {command} " in result.stdout.split("examples:")[1]
