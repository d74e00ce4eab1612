"""Merging: the formula, DoRA as in peft and as in ComfyUI, refusal before anything is changed, LoRAs in the pipeline."""

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from blip3o_core import Blip3oPipeline
from blip3o_core.errors import CheckpointError, InputError
from blip3o_core.lora.apply import for_host, for_peft, merge, merge_queries, require_base, updated_weight
from blip3o_core.lora.files import Adapter, LoraFile, write_lora
from blip3o_core.models.nextdit import NextDiT
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from .lora_samples import random_adapter, random_lora

LAYER = "layers.0.attn1.to_q"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Blip3oCheckpoint:
    return Blip3oCheckpoint.open(tiny_checkpoint)


@pytest.fixture
def dit(checkpoint) -> NextDiT:
    return checkpoint.load_dit(dtype=torch.float32)


def comfyui_dora(weight: torch.Tensor, adapter: Adapter, strength: float) -> torch.Tensor:
    """What ComfyUI 0.30.0 does with `.dora_scale` (out, 1): comfy/weight_adapter/base.py, weight_decompose."""
    calculated = weight + adapter.delta()
    norms = weight.norm(dim=1, keepdim=True) + torch.finfo(weight.dtype).eps  # of the base
    calculated = calculated * (adapter.magnitude[:, None] / norms)
    return weight + strength * (calculated - weight)


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -2.0])
def test_every_adapted_weight_gets_its_update_and_no_other_weight_changes(checkpoint, dit, strength):
    adapters = random_lora(checkpoint).adapters["dit"]
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    merge(dit, adapters, strength, "a.safetensors")
    changed = 0
    for name, tensor in dit.state_dict().items():
        adapter = adapters.get(name.removesuffix(".weight"))
        expected = before[name]
        if adapter is not None:
            expected = expected + strength * adapter.alpha / adapter.rank * adapter.up @ adapter.down
            changed += not torch.equal(tensor, before[name])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)  # float32: measured 6e-8
    assert changed == (0 if strength == 0 else 30)


def test_bfloat16_weights_are_rounded_once_from_the_float32_sum(checkpoint):
    network = checkpoint.load_dit(dtype=torch.bfloat16)
    weight = network.get_submodule(LAYER).weight
    before = weight.float()
    adapter = random_adapter((48, 48), torch.Generator().manual_seed(1))
    merge(network, {LAYER: adapter}, 0.7, "a.safetensors")
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, (before + 0.7 * adapter.delta()).bfloat16())
    assert not torch.equal(weight, before.bfloat16() + (0.7 * adapter.delta()).bfloat16())  # rounded twice


def test_dora_gives_the_rows_their_magnitude_in_new_directions(dit):
    weight = dit.get_submodule(LAYER).weight
    adapter = random_adapter((48, 48), torch.Generator().manual_seed(1), dora=True)
    updated = updated_weight(weight, adapter)
    torch.testing.assert_close(updated.norm(dim=1), adapter.magnitude, rtol=1e-6, atol=0)
    cosine = torch.cosine_similarity(updated, weight + adapter.delta(), dim=1)
    torch.testing.assert_close(cosine, torch.ones(48), rtol=0, atol=1e-6)
    torch.testing.assert_close(updated_weight(weight, adapter, 0.25), weight + 0.25 * (updated - weight), rtol=0, atol=1e-6)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_magnitudes_for_comfyui_give_there_what_the_others_give_here(checkpoint, dit, strength):
    lora = random_lora(checkpoint, parts=["dit"], dora=True)
    hosted = for_host(lora, {"dit": dit})
    back = for_peft(hosted, {"dit": dit})
    plain_error = host_error = 0.0
    for path, adapter in lora.adapters["dit"].items():
        weight = dit.get_submodule(path).weight
        expected = updated_weight(weight, adapter, strength)
        own = hosted.adapters["dit"][path]
        assert own.over_base and not adapter.over_base
        torch.testing.assert_close(updated_weight(weight, own, strength), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(back.adapters["dit"][path].magnitude, adapter.magnitude, rtol=1e-6, atol=0)
        host_error = max(host_error, (comfyui_dora(weight, own, strength) - expected).abs().max().item())
        plain_error = max(plain_error, (comfyui_dora(weight, adapter, strength) - expected).abs().max().item())
    assert host_error < 2e-6  # float32: measured 1.8e-7
    assert plain_error > 0.05  # measured 0.09 and 0.054: why for_host exists


def test_the_kind_of_magnitudes_is_kept_in_the_file(checkpoint, dit, tmp_path):
    from blip3o_core.lora.files import read_lora

    hosted = for_host(random_lora(checkpoint, parts=["dit"], dora=True), {"dit": dit})
    write_lora(tmp_path / "a.safetensors", hosted)
    read = read_lora(tmp_path / "a.safetensors")
    assert read.metadata["blip3o.dora_norm"] == "base"
    assert all(adapter.over_base for adapter in read.all_adapters)
    write_lora(tmp_path / "b.safetensors", for_peft(read, {"dit": dit}))
    assert "blip3o.dora_norm" not in read_lora(tmp_path / "b.safetensors").metadata


UNFIT: dict[str, tuple[Callable[[dict[str, Adapter]], None], str]] = {
    "layer that is not there": (
        lambda a: a.update({"layers.9.attn1.to_q": a[LAYER]}), r"1 of 31 layers are not in it: layers\.9\.attn1\.to_q\.weight"),
    "other shape": (
        lambda a: a.update({LAYER: random_adapter((48, 64), torch.Generator())}), r"to_q\.weight is \[48, 48\], the update \[48, 64\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_a_lora_of_another_model_is_refused_before_anything_is_changed(checkpoint, dit, kind):
    change, message = UNFIT[kind]
    adapters = dict(random_lora(checkpoint).adapters["dit"])
    change(adapters)
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    with pytest.raises(InputError, match=f"a.safetensors: doesn't fit.*{message}.*another base model"):
        merge(dit, adapters, 1.0, "a.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())


def test_differences_of_norms_and_biases_are_added(dit):
    norm, bias = "layers.0.norm2.weight", "caption_projection.linear_1.bias"
    before = {name: dit.get_parameter(name).clone() for name in (norm, bias)}
    merge(dit, {}, 0.5, "a.safetensors", differences={norm: torch.ones(48), bias: torch.full((48,), 2.0)})
    torch.testing.assert_close(dit.get_parameter(norm), before[norm] + 0.5)
    torch.testing.assert_close(dit.get_parameter(bias), before[bias] + 1)
    with pytest.raises(InputError, match=r"norm2.weight is \[48\], the update \[64\]"):
        merge(dit, {}, 1.0, "a.safetensors", differences={norm: torch.ones(64)})


def test_learned_queries_are_moved(checkpoint):
    backbone = checkpoint.load_backbone(dtype=torch.float32)
    before = backbone.latent_queries.clone()
    merge_queries(backbone, torch.ones(1, 64, 64), 0.25)
    torch.testing.assert_close(backbone.latent_queries, before + 0.25)
    with pytest.raises(InputError, match=r"queries are \[1, 32, 64\], this model's \[1, 64, 64\]"):
        merge_queries(backbone, torch.ones(1, 32, 64), 1.0)


def test_another_base_is_named_unless_it_is_allowed(caplog):
    lora = LoraFile({}, None, {"blip3o.base_fingerprint": "a" * 16, "blip3o.base_model": "BLIP3o-Model-4B"})
    require_base(lora, "a" * 16, "fox.safetensors", False)
    with pytest.raises(InputError, match=r"fox.safetensors: trained on BLIP3o-Model-4B \(a{16}\), this is 8B \(b{16}\).*--lora-any-base"):
        require_base(lora, "b" * 16, "fox.safetensors", False, base_model="8B")
    require_base(lora, "b" * 16, "fox.safetensors", True)
    with caplog.at_level(logging.WARNING):
        assert not caplog.records
        require_base(LoraFile({}), "b" * 16, "fox.safetensors", False)
    assert "fox.safetensors doesn't say which model" in caplog.text


def test_merging_does_not_touch_the_files_of_the_checkpoint(checkpoint_copy):
    weights = checkpoint_copy / "model.safetensors"
    before = weights.read_bytes()
    own = Blip3oCheckpoint.open(checkpoint_copy)
    network = own.load_dit(dtype=torch.float32)  # memory-mapped
    merge(network, random_lora(own).adapters["dit"], 1.0, "a.safetensors")
    assert weights.read_bytes() == before


@pytest.fixture
def lora_file(checkpoint, tmp_path):
    """A file with adapters of both networks and queries."""
    write_lora(tmp_path / "fox.safetensors", random_lora(checkpoint))
    return tmp_path / "fox.safetensors"


def test_a_pipeline_with_loras_equals_one_whose_networks_were_merged(tiny_checkpoint, checkpoint, lora_file, pipe):
    lora = random_lora(checkpoint)
    adapted = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", loras=[(lora_file, 0.5), (lora_file, -0.2)])
    backbone, dit = checkpoint.load_backbone(dtype=torch.float32), checkpoint.load_dit(dtype=torch.float32)
    for strength in (0.5, -0.2):
        merge(backbone.language_model, lora.adapters["language_model"], strength, "own")
        merge_queries(backbone, lora.queries, strength)
        merge(dit, lora.adapters["dit"], strength, "own")
    own = Blip3oPipeline(checkpoint, None, device=torch.device("cpu"), dtype=torch.float32, backbone=backbone, dit=dit)
    assert own.backbone is backbone and own.dit is dit
    states = [pipeline.encode_prompt(["a cat"]) for pipeline in (adapted, own, pipe)]
    assert torch.equal(states[0], states[1])
    assert (states[0] - states[2]).abs().max() > 0.05  # measured 0.34
    latents = [pipeline.sample_embeddings(states[0], steps=2, seeds=[1]) for pipeline in (adapted, own, pipe)]
    assert torch.equal(latents[0], latents[1])
    assert (latents[0] - latents[2]).abs().max() > 0.01  # measured 0.45
    assert adapted.describe()["loras"] == "fox.safetensors:0.5, fox.safetensors:-0.2"
    assert "loras" not in pipe.describe()


def test_opposite_strengths_cancel(tiny_checkpoint, lora_file, pipe):
    both = Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", dtype="float32", loras=[(lora_file, 1.0), (lora_file, -1.0)])
    for name, weight in pipe.dit.state_dict().items():
        torch.testing.assert_close(both.dit.state_dict()[name], weight, rtol=0, atol=1e-6)


def test_a_handed_in_decoder_is_used(pipe):
    own = Blip3oPipeline(pipe.checkpoint, pipe.decoder_checkpoint, device=pipe.device, dtype=pipe.dtype, decoder_network=pipe.decoder)
    assert own.decoder is pipe.decoder


REFUSED: dict[str, tuple[Callable[[LoraFile], LoraFile], str]] = {
    "other base": (lambda lora: replace(lora, metadata=lora.metadata | {"blip3o.base_fingerprint": "0" * 16, "blip3o.base_model": "8B"}),
                   r"trained on 8B \(0{16}\), this is checkpoint"),
    "other width": (lambda lora: replace(lora, adapters={"dit": {LAYER: random_adapter((64, 64), torch.Generator())}}),
                    r"doesn't fit the diffusion transformer.*\[48, 48\], the update \[64, 64\]"),
    "unknown layer": (lambda lora: replace(lora, adapters={"language_model": {"layers.7.self_attn.q_proj": random_adapter(
        (64, 64), torch.Generator())}}), r"doesn't fit the language model.*layers\.7\.self_attn\.q_proj\.weight"),
    "other queries": (lambda lora: replace(lora, queries=torch.ones(1, 64, 32)), r"queries are \[1, 64, 32\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_the_pipeline_refuses_a_lora_before_it_loads_weights(tiny_checkpoint, checkpoint, tmp_path, kind):
    change, message = REFUSED[kind]
    write_lora(tmp_path / "fox.safetensors", change(random_lora(checkpoint)))
    loaded = []
    with pytest.raises(InputError, match=f"fox.safetensors: .*{message}"):
        Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", loras=[(tmp_path / "fox.safetensors", 1.0)],
                                       on_load=lambda *progress: loaded.append(progress))  # fmt: skip
    assert not loaded


def test_another_base_can_be_allowed_but_damage_and_strength_cannot(tiny_checkpoint, checkpoint, tmp_path):
    path = tmp_path / "fox.safetensors"
    write_lora(path, REFUSED["other base"][0](random_lora(checkpoint)))
    assert Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", loras=[(path, 1.0)], allow_other_base=True)._loras
    with pytest.raises(InputError, match="strength nan is not a finite number"):
        Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", loras=[(path, float("nan"))], allow_other_base=True)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="fox.safetensors: cut off"):
        Blip3oPipeline.from_pretrained(tiny_checkpoint, device="cpu", loras=[(path, 1.0)], allow_other_base=True)
