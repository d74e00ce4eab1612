"""A split is the model without its backbone; with that of Qwen2.5-VL it is the model again."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_core import Blip3oPipeline
from blip3o_core.errors import CheckpointError, InputError
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from ..conftest import FIRST_OWN_TOKEN


def test_a_split_with_its_qwen_is_the_model(tiny_checkpoint, pipe, split_checkpoint, qwen, photograph):
    found = Blip3oPipeline.from_pretrained(split_checkpoint, device="cpu", qwen=qwen, decoder=tiny_checkpoint)
    assert torch.equal(found.encode_prompt(["a cat"]), pipe.encode_prompt(["a cat"]))
    question = {"question": "What is this?", "images": [photograph], "max_new_tokens": 6, "return_ids": True}
    assert found.ask(**question) == pipe.ask(**question)
    small = {"steps": 2, "decoder_steps": 1, "width": 64, "height": 64, "negative": "zeros"}
    assert found.generate(["a cat"], seeds=[1], **small)[0].tobytes() == pipe.generate(["a cat"], seeds=[1], **small)[0].tobytes()
    assert found.checkpoint.fingerprint == pipe.checkpoint.fingerprint
    single_file = Blip3oPipeline.from_pretrained(split_checkpoint, device="cpu", qwen=qwen / "model.safetensors", decoder=tiny_checkpoint)
    assert torch.equal(single_file.encode_prompt(["a cat"]), pipe.encode_prompt(["a cat"]))


def test_a_split_holds_neither_backbone_nor_decoder(tiny_checkpoint, split_checkpoint):
    names = set(load_file(split_checkpoint / "model.safetensors"))
    assert {name.split(".")[1] for name in names} == {"dit", "latent_queries", "embed_tokens", "lm_head"}
    assert not (split_checkpoint / "diffusion-decoder").exists() and (split_checkpoint / "tokenizer_config.json").exists()
    rows = load_file(split_checkpoint / "model.safetensors")["blip3o_split.embed_tokens"]
    assert len(rows) == Blip3oCheckpoint.open(tiny_checkpoint).text_config.vocab_size - FIRST_OWN_TOKEN


def test_it_needs_its_own_qwen(tiny_checkpoint, split_checkpoint, qwen, tmp_path):
    with pytest.raises(CheckpointError, match="a split, which holds queries and diffusion transformer alone.*--qwen"):
        Blip3oCheckpoint.open(split_checkpoint)
    with pytest.raises(InputError, match="has a backbone of its own"):
        Blip3oCheckpoint.open(tiny_checkpoint, qwen=qwen)
    other = Path(shutil.copytree(qwen, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.01
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="another language model"):
        Blip3oCheckpoint.open(split_checkpoint, qwen=other)
    save_file({name: tensor for name, tensor in tensors.items() if "visual" not in name}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no Qwen2.5-VL"):
        Blip3oCheckpoint.open(split_checkpoint, qwen=other)
    small = Path(shutil.copytree(qwen, tmp_path / "small"))
    tensors = load_file(small / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()
    save_file(tensors, small / "model.safetensors")
    with pytest.raises(CheckpointError, match="does not go with"):
        Blip3oCheckpoint.open(split_checkpoint, qwen=small)


def test_nothing_is_overwritten(tiny_checkpoint, split_checkpoint):
    from blip3o_core.cli.main import main

    assert main(["split", str(tiny_checkpoint), "--output", str(split_checkpoint)]) == 1
    assert main(["split", str(tiny_checkpoint), "--output", str(tiny_checkpoint)]) == 1
