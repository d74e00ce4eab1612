"""What can be wrong with a folder: found when it is opened, before a tensor is read."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from blip3o_core import Blip3oPipeline, CheckpointError, InputError
from blip3o_core.cli.options import MODEL_VARIABLE, chosen_model
from blip3o_core.variants.blip3o import NANO_FOLDER, Blip3oCheckpoint, DrawingDefaults


def edit_config(file: Path, **changes) -> None:
    config = json.loads(file.read_text("utf-8"))
    config.update(changes)
    file.write_text(json.dumps(config), "utf-8")


def open_pipeline(folder: Path, **arguments) -> Blip3oPipeline:
    return Blip3oPipeline.from_pretrained(folder, device="cpu", dtype=torch.float32, **arguments)


def test_a_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        open_pipeline(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder(tmp_path):
    save_file({"model.diffusion_model.out.0.weight": torch.zeros(1)}, tmp_path / "sdxl.safetensors")
    with pytest.raises(CheckpointError, match="a single file"):
        open_pipeline(tmp_path / "sdxl.safetensors")


def test_a_plain_qwen_folder(checkpoint_copy):
    edit_config(checkpoint_copy / "config.json", model_type="qwen2_5_vl")
    with pytest.raises(CheckpointError, match="base model, which can't draw"):
        open_pipeline(checkpoint_copy)


def test_a_qwen_checkpoint_with_a_changed_config(checkpoint_copy, edit_tensors):
    def strip(tensors):
        for name in [name for name in tensors if name.startswith(("model.dit.", "model.latent"))]:
            del tensors[name]

    edit_tensors(checkpoint_copy / "model.safetensors", strip)
    with pytest.raises(CheckpointError, match="no tensor of: queries, dit"):
        open_pipeline(checkpoint_copy)


def test_a_diffusers_pipeline_folder(checkpoint_copy):
    with pytest.raises(CheckpointError, match="a diffusers pipeline"):
        open_pipeline(checkpoint_copy / "diffusion-decoder")


def test_unknown_tensors_are_named(checkpoint_copy, edit_tensors):
    edit_tensors(checkpoint_copy / "model.safetensors", lambda tensors: tensors.update({"model.alien.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match="first model.alien.weight"):
        open_pipeline(checkpoint_copy)


def test_leftovers_of_training_are_skipped(checkpoint_copy, edit_tensors, expected, expected_text, relative_error):
    edit_tensors(checkpoint_copy / "model.safetensors", lambda tensors: tensors.update({"model.vae.x.weight": torch.zeros(1)}))
    states = open_pipeline(checkpoint_copy).encode_prompt(expected_text["prompts"][:1])
    assert relative_error(states, expected["query.0"]) <= 1e-5


def test_missing_and_misshapen_tensors_come_in_one_error(checkpoint_copy, edit_tensors):
    def damage(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.zeros(7)

    edit_tensors(checkpoint_copy / "model.safetensors", damage)
    with pytest.raises(CheckpointError, match="1 missing: language_model.layers.1.mlp.up_proj.weight.*model.norm.weight is .7."):
        open_pipeline(checkpoint_copy)


def test_a_truncated_shard(checkpoint_copy):
    file = checkpoint_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cut off at"):
        open_pipeline(checkpoint_copy)


def test_a_vocabulary_that_does_not_fit_the_embedding(checkpoint_copy):
    edit_config(checkpoint_copy / "config.json", vocab_size=500)
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight is \[417, 64\], expected \[500, 64\]"):
        open_pipeline(checkpoint_copy)


@pytest.mark.parametrize("name", ["hidden_size", "rope_scaling"])
def test_a_config_without_a_size(checkpoint_copy, name):
    config = json.loads((checkpoint_copy / "config.json").read_text("utf-8"))
    del config[name]
    (checkpoint_copy / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(CheckpointError, match="doesn't describe a Qwen2.5-VL backbone"):
        open_pipeline(checkpoint_copy)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_damaged_config(checkpoint_copy, text):
    (checkpoint_copy / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        open_pipeline(checkpoint_copy)


def test_no_tokenizer(checkpoint_copy):
    (checkpoint_copy / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        open_pipeline(checkpoint_copy)


def test_the_tokenizer_of_the_base_model(checkpoint_copy):
    edit_config(checkpoint_copy / "added_tokens.json")
    for file in ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json"):
        text = (checkpoint_copy / file).read_text("utf-8")
        (checkpoint_copy / file).write_text(text.replace("[IMG]", "[OTHER]"), "utf-8")
    with pytest.raises(CheckpointError, match=r"no token \[IMG\]"):
        open_pipeline(checkpoint_copy)


def test_a_damaged_tokenizer(checkpoint_copy):
    (checkpoint_copy / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match="vocab.json: not readable as JSON"):
        open_pipeline(checkpoint_copy)
    (checkpoint_copy / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match="tokenizer files are damaged"):
        open_pipeline(checkpoint_copy)


def test_nan_weights_are_refused_when_they_are_loaded(checkpoint_copy, edit_tensors):
    def damage(tensors):
        tensors["model.dit.model.layers.1.attn1.to_q.weight"][3, 4] = float("nan")

    edit_tensors(checkpoint_copy / "model.safetensors", damage)
    with pytest.raises(CheckpointError, match="model.dit.model.layers.1.attn1.to_q.weight holds nan"):
        open_pipeline(checkpoint_copy).dit  # noqa: B018


def test_without_a_decoder_prompts_can_be_encoded_but_not_drawn(checkpoint_copy):
    shutil.rmtree(checkpoint_copy / "diffusion-decoder")
    pipe = open_pipeline(checkpoint_copy)
    z = pipe.sample_embeddings(pipe.encode_prompt(["a cat"]), steps=2)
    for draw in (lambda: pipe.decode_embeddings(z), lambda: pipe.generate(["a cat"])):
        with pytest.raises(CheckpointError, match="no diffusion decoder here"):
            draw()


def test_the_decoder_may_lie_elsewhere(checkpoint_copy, tmp_path):
    shutil.move(checkpoint_copy / "diffusion-decoder", tmp_path / "decoder")
    (tmp_path / "decoder" / "unet" / "diffusion_pytorch_model.bf16.safetensors").rename(
        tmp_path / "decoder" / "unet" / "diffusion_pytorch_model.safetensors"
    )  # the plain variant
    pipe = open_pipeline(checkpoint_copy, decoder=tmp_path / "decoder")
    assert pipe.generate(["a cat"], width=64, height=64, steps=2, decoder_steps=2)[0].size == (64, 64)


def test_a_decoder_of_other_embeddings(checkpoint_copy, edit_tensors):
    unet = checkpoint_copy / "diffusion-decoder" / "unet"

    def widen(tensors):
        for name, tensor in tensors.items():
            if ".attn2.to_k." in name or ".attn2.to_v." in name:
                tensors[name] = torch.zeros(len(tensor), 56)
        first = tensors["add_embedding.linear_1.weight"]
        tensors["add_embedding.linear_1.weight"] = torch.zeros(len(first), first.shape[1] + 8)

    edit_config(unet / "config.json", cross_attention_dim=56, projection_class_embeddings_input_dim=248)
    edit_tensors(unet / "diffusion_pytorch_model.bf16.safetensors", widen)
    with pytest.raises(InputError, match="reads embeddings of width 56, .* makes width 48"):
        open_pipeline(checkpoint_copy)


def test_a_plain_sdxl_unet_is_no_decoder(checkpoint_copy):
    edit_config(checkpoint_copy / "diffusion-decoder" / "unet" / "config.json", projection_class_embeddings_input_dim=2816)
    with pytest.raises(CheckpointError, match="A plain SDXL UNet can't stand in"):
        open_pipeline(checkpoint_copy)


@pytest.mark.parametrize("part", ["unet/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_decoder_file_that_is_missing(checkpoint_copy, part):
    (checkpoint_copy / "diffusion-decoder" / part).unlink()
    if part == "unet/config.json":  # without it nothing shows that there is a decoder at all
        with pytest.raises(CheckpointError, match="no diffusion decoder here"):
            open_pipeline(checkpoint_copy, decoder=checkpoint_copy)
    else:
        with pytest.raises(CheckpointError, match="missing. Download the whole diffusion-decoder"):
            open_pipeline(checkpoint_copy)


def test_shards_resaved_by_newer_transformers_load_too(checkpoint_copy, expected, expected_text, relative_error):
    """Nested configuration and `model.language_model.` names, as transformers >= 4.52 writes them."""
    tensors = load_file(checkpoint_copy / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in (("model.embed_tokens.", "model.language_model.embed_tokens."), ("model.norm.", "model.language_model.norm."),
                         ("model.layers.", "model.language_model.layers."), ("visual.", "model.visual.")):  # fmt: skip
            if name.startswith(old):
                name = new + name[len(old) :]
                break
        renamed[name] = tensor
    save_file(renamed, checkpoint_copy / "model.safetensors")
    config = json.loads((checkpoint_copy / "config.json").read_text("utf-8"))
    text = {name: config.pop(name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                                "num_attention_heads", "num_key_value_heads", "rms_norm_eps")}  # fmt: skip
    text["rope_parameters"] = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": config.pop("rope_theta")}
    del config["rope_scaling"]
    (checkpoint_copy / "config.json").write_text(json.dumps({**config, "text_config": text}), "utf-8")
    states = open_pipeline(checkpoint_copy).encode_prompt(expected_text["prompts"][:1])
    assert relative_error(states, expected["query.0"]) <= 1e-5


def test_a_checkpoint_may_have_settings_of_its_own_for_drawing(checkpoint_copy, pipe):
    assert pipe.drawing == DrawingDefaults(
        solver="dpmpp_2m", steps=12, guidance_scale=3.0, decoder_steps=50, decoder_guidance_scale=3.0, width=1024, height=1024
    )
    own = {"solver": "euler", "steps": 2, "guidance_scale": 1.5, "decoder_steps": 3, "decoder_guidance_scale": 1, "width": 64, "height": 96}
    edit_config(checkpoint_copy / "config.json", drawing=own)
    quick = open_pipeline(checkpoint_copy)
    [picture] = quick.generate(["a cat"], seeds=[7])
    assert picture.size == (64, 96)
    [said] = pipe.generate(["a cat"], seeds=[7], **own)
    assert picture.tobytes() == said.tobytes()
    [other] = quick.generate(["a cat"], seeds=[7], width=96)
    assert other.size == (96, 96), "what is said goes first"
    [edited] = quick.edit([picture], ["make it red"])
    assert edited.size == (64, 96)


@pytest.mark.parametrize("drawing", [{"stepz": 3}, {"steps": 2.5}, {"steps": 0}, {"guidance_scale": "3"}])
def test_settings_for_drawing_that_make_no_sense(checkpoint_copy, drawing):
    edit_config(checkpoint_copy / "config.json", drawing=drawing)
    with pytest.raises(CheckpointError, match=f"drawing.{next(iter(drawing))} = .* makes no sense"):
        open_pipeline(checkpoint_copy)


def test_eyes_that_know_one_size_get_that_size(checkpoint_copy, pipe):
    edit_config(checkpoint_copy / "config.json", image_side=56)
    own = open_pipeline(checkpoint_copy)
    picture = Image.linear_gradient("L").resize((300, 200))
    squeezed = {"image_size": (56, 56)}
    assert torch.equal(own.encode_prompt(["edit it"], images=[picture]), pipe.encode_prompt(["edit it"], images=[picture], **squeezed))
    bounds = {"min_pixels": 56 * 56, "max_pixels": 56 * 56, "max_new_tokens": 5, "return_ids": True}
    wide = Image.linear_gradient("L").resize((1000, 1000))
    assert own.ask("What is it?", images=[wide], max_new_tokens=5, return_ids=True) == pipe.ask("What is it?", images=[wide], **bounds)
    edit_config(checkpoint_copy / "config.json", image_side=50)
    with pytest.raises(CheckpointError, match="image_side is 50, not a multiple of 28"):
        open_pipeline(checkpoint_copy)


def test_nano_is_the_packaged_model_unless_a_checkpoint_has_that_name(tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano" / "data").mkdir(parents=True)  # where `blip3o train-nano --output nano` works
    assert Blip3oCheckpoint.open("nano").folder == NANO_FOLDER
    (tmp_path / "nano" / "data").rmdir()
    (tmp_path / "nano").rmdir()
    (tmp_path / "nano").symlink_to(tiny_checkpoint)
    assert Blip3oCheckpoint.open("nano").folder == Path("nano")
    nothing_chosen = argparse.Namespace(model=None)
    monkeypatch.delenv(MODEL_VARIABLE, raising=False)
    assert chosen_model(nothing_chosen) == str(NANO_FOLDER)
