"""The language model in 8 and 4 bits: what is stored, what it computes, and what can't be done with it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from blip3o_core import Blip3oPipeline
from blip3o_core.checkpoint import streaming
from blip3o_core.cli.main import main
from blip3o_core.errors import CheckpointError, InputError
from blip3o_core.lora.files import write_lora
from blip3o_core.models.quantised import FORMATS, QuantisedEmbedding, QuantisedLinear, dequantise, quantise, stored_as
from blip3o_core.variants.blip3o import Blip3oCheckpoint
from blip3o_core.variants.quantise import save_quantised

from .lora_samples import random_lora

ERRORS = {"fp8": 0.03, "int8": 0.011, "int4": 0.13}
"""Largest relative error (in norm) of rows of normal numbers: rounding to steps of s is off by s / sqrt(12), and s is the largest of a row
(of 192, about 2.9 deviations) over 127, or of a group (of 64) over 7, less what clipping gains."""


@pytest.fixture(scope="module", params=FORMATS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def small(kind, tiny_checkpoint, tmp_path_factory):
    output = tmp_path_factory.mktemp("quantised") / kind
    assert main(["quantize", str(tiny_checkpoint), "--format", kind, "--output", str(output)]) == 0
    return output


def test_a_matrix_comes_back_nearly_as_it_was(kind):
    weight = torch.randn(48, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 48)[:, None]
    stored, scale = quantise(weight.to(torch.bfloat16), kind)
    assert ((tuple(stored.shape), stored.dtype), (tuple(scale.shape), scale.dtype)) == stored_as((48, 192), kind)
    rows = (dequantise(stored, scale) - weight.bfloat16().float()).norm(dim=1) / weight.norm(dim=1)
    assert rows.max() <= ERRORS[kind]
    assert torch.equal(dequantise(*quantise(torch.zeros(4, 8), kind)), torch.zeros(4, 8))


def test_four_bits_of_neighbours_share_a_byte():
    weight = torch.arange(-7.0, 8.0).repeat(4)[None, :56]
    stored, scale = quantise(weight, "int4")
    assert stored.shape == (1, 28) and torch.equal(dequantise(stored, scale), weight)
    with pytest.raises(CheckpointError, match="a matrix of 7 columns can't be stored in 4 bits"):
        quantise(torch.ones(2, 7), "int4")


def test_query_states_stay_close_and_answers_are_given(small, kind, pipe, photograph):
    lean = Blip3oPipeline.from_pretrained(small, device="cpu", dtype=torch.float32)
    found, exact = (p.encode_prompt(["a cat", "two dogs in the snow"]) for p in (lean, pipe))
    similar = torch.nn.functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0)
    assert similar >= {"fp8": 0.99, "int8": 0.999, "int4": 0.9}[kind], similar
    assert len(lean.ask("What is this?", [photograph], max_new_tokens=4, return_ids=True)) >= 1
    assert lean.dit.layers[0].attn1.to_q.weight.dtype == torch.float32  # everything else is as it was
    assert type(lean.output_head) is QuantisedLinear and type(lean.backbone.language_model.embed_tokens) is QuantisedEmbedding
    assert lean.checkpoint.fingerprint == pipe.checkpoint.fingerprint


def test_one_layer_at_a_time_gives_the_same(small, monkeypatch):
    monkeypatch.setattr(streaming, "KEPT_BYTES", 600)
    states = [Blip3oPipeline.from_pretrained(small, device="cpu", dtype=torch.float32, offload=offload).encode_prompt(["a cat"])
              for offload in ("none", "layer")]  # fmt: skip
    assert torch.equal(*states)


def test_memory_is_what_was_promised(kind):
    """Of the published 4B: 36 layers of width 2048; 45 % less with 8 bits, 70 % with 4."""
    hidden, inner, kv, vocabulary, layers = 2048, 11008, 256, 151668, 36
    matrices = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)] * layers

    def nbytes(shape, own) -> int:
        return sum(torch.Size(size).numel() * dtype.itemsize for size, dtype in stored_as(shape, own))

    before = 2 * sum(rows * columns for rows, columns in [*matrices, (vocabulary, hidden)])
    after = sum(nbytes(shape, kind) for shape in matrices) + nbytes((vocabulary, hidden), "int8" if kind == "int4" else kind)
    assert 1 - after / before >= (0.7 if kind == "int4" else 0.45)


def test_what_needs_the_original_says_so(small, kind, tmp_path):
    checkpoint = Blip3oCheckpoint.open(small)
    assert checkpoint.is_quantised and json.loads((small / "config.json").read_text("utf-8"))["blip3o_quantised"] == kind
    with pytest.raises(InputError, match="is quantised already"):
        save_quantised(checkpoint, tmp_path / "again", kind)
    lora = tmp_path / "lora.safetensors"
    write_lora(lora, random_lora(checkpoint))
    with pytest.raises(InputError, match="changes the language model, which is quantised"):
        Blip3oPipeline.from_pretrained(small, loras=[(lora, 1.0)])


def test_scales_that_fit_nothing_are_refused(small, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    [file] = broken.glob("model-updated*.safetensors")
    tensors = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    save_file({**tensors, name: tensors[name][:-1].clone()}, file)
    with pytest.raises(CheckpointError, match="Quantise the model again"):
        Blip3oCheckpoint.open(broken)
