"""LoRA files: what is written comes back, what others write is understood, what is wrong is named."""

import re
from collections.abc import Callable

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blip3o_core.errors import CheckpointError, OutputError
from blip3o_core.lora.files import Adapter, LoraFile, locate, lora_metadata, read_lora, write_lora
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from .lora_samples import random_lora

LAYER = "layers.0.attn1.to_q"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Blip3oCheckpoint:
    return Blip3oCheckpoint.open(tiny_checkpoint)


def factors(rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A (rank, 48) and lora_B (48, rank)."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rank, 48, generator=generator), torch.randn(48, rank, generator=generator)


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_comes_back_as_it_was_written(checkpoint, tmp_path, dora):
    written = random_lora(checkpoint, dora=dora)
    write_lora(tmp_path / "a.safetensors", written)
    read = read_lora(tmp_path / "a.safetensors")
    assert read.metadata == written.metadata
    assert read.metadata["blip3o.base_fingerprint"] == checkpoint.fingerprint
    assert {name: len(group) for name, group in read.adapters.items()} == {"dit": 30, "language_model": 12}
    assert torch.equal(read.queries, written.queries)
    for component, adapters in written.adapters.items():
        for path, adapter in adapters.items():
            other = read.adapters[component][path]
            assert (other.rank, other.alpha, other.over_base) == (adapter.rank, adapter.alpha, False)
            assert len(other.tensors) == (3 if dora else 2)
            assert all(torch.equal(a, b) for a, b in zip(adapter.tensors, other.tensors, strict=True)), path
    write_lora(tmp_path / "b.safetensors", read)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_names_shapes_and_metadata_in_the_file_are_those_that_comfyui_reads(tmp_path):
    down, up = factors()
    lora = LoraFile({"dit": {LAYER: Adapter(down, up, 3.0, torch.ones(48))}})
    write_lora(tmp_path / "a.safetensors", LoraFile(lora.adapters, None, lora_metadata(lora, title="fox", trigger="xyz")))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:  # the format's own reader
        metadata = file.metadata()
        shapes = {name: (tuple(file.get_tensor(name).shape), file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118
    assert shapes == {
        f"diffusion_model.{LAYER}.lora_A.weight": ((2, 48), torch.float32),
        f"diffusion_model.{LAYER}.lora_B.weight": ((48, 2), torch.float32),
        f"diffusion_model.{LAYER}.alpha": ((), torch.float32),
        f"diffusion_model.{LAYER}.dora_scale": ((48, 1), torch.float32),
    }
    assert metadata.pop("modelspec.date")[:2] == "20"
    assert metadata == {
        "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "blip3o/lora", "modelspec.title": "fox",
        "modelspec.trigger_phrase": "xyz", "blip3o.trigger": "xyz", "blip3o.rank": "2", "blip3o.alpha": "3",
    }  # fmt: skip


def test_the_update_is_alpha_over_rank_times_b_a():
    down, up = factors(rank=2)
    torch.testing.assert_close(Adapter(down, up, alpha=3.0).delta(), 1.5 * up @ down, rtol=0, atol=1e-6)
    half = Adapter(down.bfloat16(), up.bfloat16(), alpha=3.0).delta()
    assert half.dtype == torch.float32
    assert torch.equal(half, 1.5 * (up.bfloat16().float() @ down.bfloat16().float()))


@pytest.mark.parametrize(("down_name", "up_name"), [
    (f"diffusion_model.{LAYER}.lora_down.weight", f"diffusion_model.{LAYER}.lora_up.weight"),  # ComfyUI's SaveLoRA
    (f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight"),  # diffusers
    (f"base_model.model.{LAYER}.lora_A.weight", f"base_model.model.{LAYER}.lora_B.weight"),  # peft on the network
    (f"base_model.model.model.dit.model.{LAYER}.lora_A.weight", f"base_model.model.model.dit.model.{LAYER}.lora_B.weight"),  # on all
    (f"diffusion_model.{LAYER}.lora_A.default.weight", f"diffusion_model.{LAYER}.lora_B.default.weight"),
    (f"{LAYER}.lora.down.weight", f"{LAYER}.lora.up.weight"),
    (f"{LAYER}.lora_A", f"{LAYER}.lora_B"),
])  # fmt: skip
def test_names_of_other_trainers_are_understood(tmp_path, down_name, up_name):
    down, up = factors()
    save_file({down_name: down, up_name: up}, tmp_path / "a.safetensors")
    [(path, adapter)] = read_lora(tmp_path / "a.safetensors").adapters["dit"].items()
    assert path == LAYER
    assert adapter.alpha == adapter.rank == 2  # no alpha: scale 1
    assert torch.equal(adapter.down, down) and torch.equal(adapter.up, up)


@pytest.mark.parametrize(("name", "expected"), [
    ("language_model.layers.1.self_attn.q_proj", ("language_model", "layers.1.self_attn.q_proj")),
    ("base_model.model.model.layers.1.mlp.up_proj", ("language_model", "layers.1.mlp.up_proj")),
    ("base_model.model.language_model.layers.1.mlp.up_proj", ("language_model", "layers.1.mlp.up_proj")),
    ("caption_projection.linear_1", ("dit", "caption_projection.linear_1")),
    ("diffusion_model.double_blocks.0.img_attn", ("dit", "double_blocks.0.img_attn")),  # said to be; its shape check fails later
    ("transformer.double_blocks.0.img_attn", None),
    ("diffusion_model.layers.1.self_attn.q_proj", None),  # says one network, names a layer of the other
    ("lora_unet_down_blocks_0_attentions_0", None),
    ("model.visual.blocks.0.attn.qkv", None),
])  # fmt: skip
def test_the_network_of_a_layer_is_recognised(name, expected):
    assert locate(name) == expected


def test_what_train_lora_node_writes_for_norms_and_biases_is_kept(tmp_path):
    down, up = factors()
    tensors = {
        f"diffusion_model.{LAYER}.lora_down.weight": down, f"diffusion_model.{LAYER}.lora_up.weight": up,
        f"diffusion_model.{LAYER}.alpha": torch.tensor(1.0),
        "diffusion_model.layers.0.norm2.diff": torch.full((48,), 0.5), "diffusion_model.caption_projection.linear_1.diff_b": torch.ones(48),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    lora = read_lora(tmp_path / "a.safetensors")
    assert lora.adapters["dit"][LAYER].scale == 0.5
    assert {name: difference.mean().item() for name, difference in lora.differences["dit"].items()} == {
        "layers.0.norm2.weight": 0.5, "caption_projection.linear_1.bias": 1.0
    }  # fmt: skip
    write_lora(tmp_path / "b.safetensors", lora)
    renamed = {"lora_down": "lora_A", "lora_up": "lora_B"}
    assert load_file(tmp_path / "b.safetensors").keys() == {re.sub("lora_down|lora_up", lambda m: renamed[m[0]], name) for name in tensors}


Change = Callable[[dict[str, torch.Tensor]], None]
A, B = f"diffusion_model.{LAYER}.lora_A.weight", f"diffusion_model.{LAYER}.lora_B.weight"
BROKEN: dict[str, tuple[Change, str]] = {
    "B without A": (lambda t: t.pop(A), rf"{LAYER} has lora_B.weight.* but no lora_A"),
    "A without B": (lambda t: t.pop(B), rf"{LAYER} has .*lora_A.weight.* but no lora_B"),
    "other rank": (lambda t: t.update({B: torch.zeros(48, 3)}), r"lora_A \[2, 48\] and lora_B \[48, 3\]"),
    "rank 0": (lambda t: t.update({A: torch.zeros(0, 48), B: torch.zeros(48, 0)}), r"lora_A \[0, 48\]"),
    "nan": (lambda t: t[A].fill_(float("nan")), r"holds nan or infinite"),
    "infinite alpha": (lambda t: t.update({f"diffusion_model.{LAYER}.alpha": torch.tensor(float("inf"))}), r"alpha holds nan or infinite"),
    "alpha per row": (lambda t: t.update({f"diffusion_model.{LAYER}.alpha": torch.ones(48)}), r"alpha is \[48\], expected one number"),
    "integers": (lambda t: t.update({A: torch.ones(2, 48, dtype=torch.int8)}), r"stored as torch.int8"),
    "magnitude over inputs": (lambda t: t.update({f"diffusion_model.{LAYER}.dora_scale": torch.ones(1, 48)}), r"dora_scale is \[1, 48\]"),
    "unknown layer": (lambda t: t.update({"lora_unet_down_blocks_0.lora_up.weight": torch.ones(2, 2)}),
                      r"holds 1 tensors that no BLIP3-o LoRA has: lora_unet_down_blocks_0.lora_up.weight"),
    "unknown kind": (lambda t: t.update({f"diffusion_model.{LAYER}.hada_w1_a": torch.ones(2, 2)}), r"no BLIP3-o LoRA has: .*hada_w1_a"),
    "the same twice": (lambda t: t.update({f"transformer.{LAYER}.lora_A.weight": torch.ones(2, 48)}), r"are the same matrix of one layer"),
    "nothing": (lambda t: t.clear(), r"holds no LoRA: 0 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_with_its_name_and_what_is_wrong(tmp_path, kind):
    change, message = BROKEN[kind]
    down, up = factors()
    tensors = {A: down, B: up}
    change(tensors)
    save_file(tensors, tmp_path / "broken.safetensors")
    with pytest.raises(CheckpointError, match=f"broken.safetensors: .*{message}"):
        read_lora(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("end", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, checkpoint, end):
    write_lora(tmp_path / "a.safetensors", random_lora(checkpoint))
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:end])
    with pytest.raises(CheckpointError, match="a.safetensors: .*(cut off|Download)"):
        read_lora(tmp_path / "a.safetensors")


def test_other_files_and_folders_are_refused(tmp_path, tiny_checkpoint):
    with pytest.raises(CheckpointError, match="missing.safetensors: the file is missing"):
        read_lora(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="a folder, but a LoRA is one .safetensors file.*blip3o lora convert"):
        read_lora(tmp_path)
    with pytest.raises(CheckpointError, match="tensors that no BLIP3-o LoRA has"):
        read_lora(tiny_checkpoint / "model.safetensors")


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, checkpoint):
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(OutputError, match="taken.safetensors: can't be written"):
        write_lora(tmp_path / "taken.safetensors", random_lora(checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == ["taken.safetensors"]


def test_a_fingerprint_tells_models_apart_and_survives_quantisation(tiny_checkpoint, checkpoint_copy, edit_tensors):
    original = Blip3oCheckpoint.open(tiny_checkpoint).fingerprint
    assert re.fullmatch("[0-9a-f]{16}", original)
    weights = checkpoint_copy / "model.safetensors"

    def changed(change: Change) -> str:
        edit_tensors(weights, change)
        return Blip3oCheckpoint.open(checkpoint_copy).fingerprint

    matrix = "model.dit.model.layers.0.attn1.to_q.weight"
    assert changed(lambda t: t.update({matrix: t[matrix].to(torch.float8_e4m3fn)})) == original
    assert changed(lambda t: t.update({name: value.bfloat16() for name, value in t.items() if value.is_floating_point()})) == original
    name = "model.dit.model.layers.1.norm2.weight"
    assert changed(lambda t: t.update({name: t[name] * 2})) != original
    assert changed(lambda t: t.update({name: t[name] / 2})) == original
    assert changed(lambda t: t.update({"model.latent_queries": t["model.latent_queries"] + 1})) != original
