"""peft and back: what peft loads acts like our merge, what peft writes is read, and nothing is lost on the way. And resizing."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from blip3o_core.errors import CheckpointError, InputError, OutputError
from blip3o_core.lora.apply import for_host, merge
from blip3o_core.lora.files import Adapter, LoraFile, read_lora, write_lora
from blip3o_core.lora.peft_folder import read_peft_folder, write_peft_folder
from blip3o_core.lora.resize import resize, update_norm
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from .lora_samples import random_lora

LAYER = "layers.0.attn1.to_q"


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint) -> Blip3oCheckpoint:
    return Blip3oCheckpoint.open(tiny_checkpoint)


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed (pip install 'comfyui-blip3o[train]')")


@torch.no_grad()
def velocity(network) -> torch.Tensor:
    """Of the same noise, timesteps and query states, (2, 48, 8, 8)."""
    generator = torch.Generator().manual_seed(3)
    x, z = torch.randn(2, 48, 8, 8, generator=generator), torch.randn(2, 64, 64, generator=generator)
    return network(x, torch.tensor([10.0, 500.0]), z)


@torch.no_grad()
def states(network) -> torch.Tensor:
    """Of the same embedded tokens, (2, 9, 64)."""
    embedded = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(3))
    return network(inputs_embeds=embedded, use_cache=False).last_hidden_state


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_that_went_through_a_folder_is_the_same_file(checkpoint, tmp_path, dora):
    write_lora(tmp_path / "a.safetensors", random_lora(checkpoint, dora=dora))
    write_peft_folder(tmp_path / "folder", read_lora(tmp_path / "a.safetensors"))
    write_lora(tmp_path / "b.safetensors", read_peft_folder(tmp_path / "folder"))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("parts", [["dit"], ["language_model"], ["latent_queries"]])
def test_a_folder_may_hold_any_part_alone(checkpoint, tmp_path, parts):
    lora = random_lora(checkpoint, parts=parts)
    write_peft_folder(tmp_path / "folder", lora)
    back = read_peft_folder(tmp_path / "folder")
    assert back.adapters.keys() == lora.adapters.keys()
    assert (back.queries is None) == (lora.queries is None)
    assert back.metadata == lora.metadata


@pytest.mark.parametrize("dora", [False, True])
def test_peft_loads_a_converted_folder_and_gives_what_our_merge_gives(checkpoint, tmp_path, peft, dora):
    lora = random_lora(checkpoint, dora=dora)
    write_peft_folder(tmp_path / "folder", lora)
    for component, folder, load, run in (
        ("dit", tmp_path / "folder", lambda: checkpoint.load_dit(dtype=torch.float32), velocity),
        ("language_model", tmp_path / "folder" / "language_model",
         lambda: checkpoint.load_backbone(dtype=torch.float32).language_model, states),
    ):  # fmt: skip
        ours = load()
        before = run(ours)
        merge(ours, lora.adapters[component], 1.0, "own")
        theirs = peft.PeftModel.from_pretrained(load(), folder)
        assert (run(ours) - before).abs().max() > 0.1
        torch.testing.assert_close(run(theirs), run(ours), rtol=0, atol=1e-5)  # float32, values to 4: measured 2.3e-6


@pytest.mark.parametrize(("dora", "rslora"), [(False, False), (True, False), (False, True)])
def test_a_folder_that_peft_wrote_is_read_and_acts_the_same(checkpoint, tmp_path, peft, dora, rslora):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["attn1.to_q", "feed_forward.linear_2"], use_dora=dora, use_rslora=rslora,
                             init_lora_weights=False, rank_pattern={"layers.1.attn1.to_q": 2},
                             alpha_pattern={"feed_forward.linear_2": 5})  # fmt: skip
    theirs = peft.get_peft_model(checkpoint.load_dit(dtype=torch.float32), config).eval()
    if dora:
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1.3
    theirs.save_pretrained(tmp_path / "theirs")
    lora = read_peft_folder(tmp_path / "theirs")
    adapters = lora.adapters["dit"]
    assert len(adapters) == 6
    root = math.sqrt(2) if rslora else 1
    assert (adapters["layers.1.attn1.to_q"].rank, adapters["layers.1.attn1.to_q"].alpha) == (2, 6 * root)
    assert adapters["layers.1.feed_forward.linear_2"].alpha == 5 * (2 if rslora else 1)
    ours = checkpoint.load_dit(dtype=torch.float32)
    before = velocity(ours)
    write_lora(tmp_path / "ours.safetensors", lora)
    merge(ours, read_lora(tmp_path / "ours.safetensors").adapters["dit"], 1.0, "own")
    assert (velocity(ours) - before).abs().max() > 0.1
    torch.testing.assert_close(velocity(theirs), velocity(ours), rtol=0, atol=1e-5)


def test_a_folder_of_the_language_model_alone_is_recognised(checkpoint, tmp_path, peft):
    config = peft.LoraConfig(r=2, target_modules=["self_attn.q_proj"], init_lora_weights=False)
    network = peft.get_peft_model(checkpoint.load_backbone(dtype=torch.float32).language_model, config)
    network.save_pretrained(tmp_path / "theirs")
    assert sorted(read_peft_folder(tmp_path / "theirs").adapters["language_model"]) == [f"layers.{i}.self_attn.q_proj" for i in range(3)]


def test_dora_for_comfyui_needs_its_base_to_become_a_folder(checkpoint, tmp_path):
    dit = checkpoint.load_dit(dtype=torch.float32)
    hosted = for_host(random_lora(checkpoint, parts=["dit"], dora=True), {"dit": dit})
    with pytest.raises(InputError, match="--model FOLDER"):
        write_peft_folder(tmp_path / "folder", hosted)
    assert not list(tmp_path.iterdir())


def test_dora_on_some_layers_only_cannot_become_a_folder(checkpoint, tmp_path):
    lora = random_lora(checkpoint, parts=["dit"], dora=True)
    plain = replace(lora.adapters["dit"][LAYER], magnitude=None)
    with pytest.raises(InputError, match="29 of 30 adapters of the dit are DoRA"):
        write_peft_folder(tmp_path / "folder", replace(lora, adapters={"dit": lora.adapters["dit"] | {LAYER: plain}}))


def test_an_existing_folder_is_kept_unless_told_otherwise(checkpoint, tmp_path):
    lora = random_lora(checkpoint)
    (tmp_path / "folder").mkdir()
    write_peft_folder(tmp_path / "folder", lora)  # empty: taken
    with pytest.raises(OutputError, match="exists and is not empty"):
        write_peft_folder(tmp_path / "folder", lora)
    (tmp_path / "folder" / "old.txt").write_text("x")
    write_peft_folder(tmp_path / "folder", lora, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "blip3o_extra.safetensors", "language_model"
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
    ({"bias": "all"}, "bias = 'all'"),
    ({"modules_to_save": ["norm_out"]}, "modules_to_save"),
    ({"peft_type": "LOHA"}, "peft_type = 'LOHA'"),
    ({"lora_alpha": "much"}, "lora_alpha or alpha_pattern of .* is no number"),
])  # fmt: skip
def test_what_two_matrices_cannot_express_is_refused(checkpoint, tmp_path, changes, message):
    write_peft_folder(tmp_path / "folder", random_lora(checkpoint, parts=["dit"]))
    file = tmp_path / "folder" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(CheckpointError, match=f"adapter_config.json: {message}"):
        read_peft_folder(tmp_path / "folder")


def test_incomplete_folders_are_named(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="no adapter_config.json with adapter_model.safetensors here"):
        read_peft_folder(tmp_path)
    write_peft_folder(tmp_path / "folder", random_lora(checkpoint, parts=["dit"]))
    (tmp_path / "folder" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="adapter_config.json: missing"):
        read_peft_folder(tmp_path / "folder")
    write_peft_folder(tmp_path / "other", random_lora(checkpoint, parts=["dit"]))
    save_file({"base_model.model.layers.0.attn1.to_q.lora_A.weight": torch.ones(2, 48)}, tmp_path / "other" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="but no lora_B"):
        read_peft_folder(tmp_path / "other")


def test_resizing_gives_the_best_approximation_of_the_rank(checkpoint):
    lora = random_lora(checkpoint, rank=6)
    resized = resize(lora, 3)
    squares = torch.zeros(2, dtype=torch.float64)
    for component, adapters in lora.adapters.items():
        for path, adapter in adapters.items():
            small = resized.lora.adapters[component][path]
            left, values, right = torch.linalg.svd(adapter.delta().double(), full_matrices=False)
            best = (left[:, :3] * values[:3]) @ right[:3]
            assert (small.rank, small.alpha) == (min(adapter.rank, 3), adapter.alpha)
            torch.testing.assert_close(small.delta().double(), best, rtol=0, atol=1e-6)  # float32: measured 2.7e-7
            squares += torch.stack([values[:3].square().sum(), values.square().sum()])
    assert resized.kept == pytest.approx((squares[0] / squares[1]).sqrt().item(), abs=1e-5)
    assert 0.5 < resized.kept_least < resized.kept < 1
    assert resized.lora.metadata["blip3o.rank"] == "2, 3"
    assert torch.equal(resized.lora.queries, lora.queries)


def test_resizing_keeps_dtype_and_an_update_of_low_rank_whole():
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn(1, 48, generator=generator), torch.randn(48, 1, generator=generator)
    doubled = Adapter(torch.cat([down, down]).bfloat16(), torch.cat([up, up], dim=1).bfloat16(), alpha=2.0)  # rank 2 on paper, 1 in truth
    resized = resize(LoraFile({"dit": {LAYER: doubled}}), 1)
    small = resized.lora.adapters["dit"][LAYER]
    assert (small.rank, small.down.dtype) == (1, torch.bfloat16)
    assert resized.kept == pytest.approx(1, abs=1e-6)
    assert (small.delta() - doubled.delta()).norm() / doubled.delta().norm() < 0.005  # bfloat16: measured 0.0024


@pytest.mark.parametrize("rank", [0, 5, -1])
def test_a_rank_outside_of_the_file_is_refused(checkpoint, rank):
    with pytest.raises(InputError, match=rf"rank {rank} is not in 1\.\.4"):
        resize(random_lora(checkpoint), rank)


def test_the_norm_of_an_update_is_that_of_its_matrix(checkpoint):
    for adapter in random_lora(checkpoint).all_adapters:
        assert update_norm(adapter) == pytest.approx(adapter.delta().norm().item(), rel=1e-5)
