"""The EVA-CLIP tower in every form it is handed around in, and what can be wrong with the file."""

import json
import logging
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blip3o_core.errors import CheckpointError
from blip3o_core.models.eva_clip import EvaClip
from blip3o_core.variants import eva_clip
from blip3o_core.variants.eva_clip import EvaClipCheckpoint

PUBLISHED = Path(__file__).parents[1] / "data" / "sdxl" / "eva_clip_vision_tower"
State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return torch.load(PUBLISHED / "pytorch_model.bin", weights_only=True)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with the tower's config.json and no weights yet."""
    shutil.copy(PUBLISHED / "config.json", tmp_path / "config.json")
    return tmp_path


def load(path: Path, dtype: torch.dtype = torch.float32) -> EvaClip:
    return EvaClipCheckpoint.open(path).load(dtype=dtype)


def assert_is_the_tower(model: EvaClip, state: State) -> None:
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), "utf-8")


# --- forms


@pytest.mark.parametrize("pooling", [1, 2, 4])
def test_how_many_patches_a_token_averages_comes_from_the_configuration(folder, state, pooling):
    save_file(state, folder / "model.safetensors")
    edit_config(folder, pooling=pooling)
    model = load(folder)
    grid = model.config.grid
    with torch.no_grad():
        pixels = torch.randn(1, 3, model.config.image_size, model.config.image_size, generator=torch.Generator().manual_seed(0))
        found, tokens = model(pixels), model.tokens(pixels).transpose(1, 2).unflatten(2, (grid, grid))
    assert found.shape[-2:] == (grid // pooling, grid // pooling)
    assert torch.allclose(found[..., -1, -1], tokens[..., -pooling:, -pooling:].mean(dim=(2, 3)), atol=1e-6)


def test_the_published_pickle(state):
    model = load(PUBLISHED)
    assert_is_the_tower(model, state)
    assert model.dtype == torch.float32 and not model.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.parameters())
    assert_is_the_tower(load(PUBLISHED / "pytorch_model.bin"), state)  # the file itself


@pytest.mark.parametrize("nested", [(), ("model",), ("module",), ("state_dict",), ("model", "module")])
@pytest.mark.parametrize("prefix", ["", "module.", "visual.", "module.visual."])
def test_nested_and_prefixed_pickles(folder, state, nested, prefix):
    content = {prefix + name: tensor for name, tensor in state.items()}
    for key in reversed(nested):
        content = {key: content, "epoch": 3}
    torch.save(content, folder / "pytorch_model.bin")
    assert_is_the_tower(load(folder), state)


def test_a_pickle_in_the_format_before_torch_1_6(folder, state):
    torch.save(dict(state), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_is_the_tower(load(folder), state)


def test_a_whole_clip_as_pickle_gives_its_tower(folder, state, caplog):
    content = {f"visual.{name}": tensor for name, tensor in state.items()}
    content |= {"logit_scale": torch.tensor(1.0), "text.token_embedding.weight": torch.zeros(2, 3), "visual.head.weight": torch.zeros(3)}
    torch.save(content, folder / "pytorch_model.bin")
    with caplog.at_level(logging.INFO):
        assert_is_the_tower(load(folder), state)
    assert "ignored 3 tensors that are no part of the tower, first head.weight" in caplog.text


@pytest.mark.parametrize("name", ["model.safetensors", "eva_fp32.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.visual."])
def test_safetensors(folder, state, name, prefix):
    save_file({prefix + key: tensor.clone() for key, tensor in state.items()}, folder / name)
    assert_is_the_tower(load(folder), state)
    assert_is_the_tower(load(folder / name), state)


def test_safetensors_are_preferred_to_a_pickle(folder, state):
    save_file({key: tensor.clone() for key, tensor in state.items()}, folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert_is_the_tower(load(folder), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_tensors_are_converted_while_loading(folder, state, dtype, kind):
    if kind == "pickle":
        torch.save(state, folder / "pytorch_model.bin")
    else:
        save_file({key: tensor.clone() for key, tensor in state.items()}, folder / "model.safetensors")
    assert_is_the_tower(load(folder, dtype), {name: tensor.to(dtype) for name, tensor in state.items()})


def test_a_loaded_tower_never_writes_to_its_file(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # float32 as stored: a private mapping of the file
    assert_is_the_tower(load(folder), state)


def test_a_pickle_that_is_mapped_several_times(monkeypatch, state):
    monkeypatch.setattr(eva_clip, "REMAP_BYTES", 100_000)
    assert_is_the_tower(load(PUBLISHED), state)


def test_progress_ends_at_the_whole_size(state):
    seen = []
    EvaClipCheckpoint.open(PUBLISHED).load(dtype=torch.float32, on_load=lambda *call: seen.append(call))
    total = sum(tensor.nbytes for tensor in state.values())
    assert len(seen) == len(state) and seen[-1] == ("EVA-CLIP tower", total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


# --- damage


class Payload:
    """What an attacker writes: unpickling it makes a folder."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["torch zip", "torch legacy", "bare pickle"])
def test_a_malicious_pickle_is_refused_and_not_run(folder, state, kind):
    content = {**state, "extra": Payload(folder / "pwned")}
    if kind == "bare pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"extra": Payload(folder / "pwned")}))
    else:
        torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "torch zip")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: refused.*Nothing in it was run"):
        EvaClipCheckpoint.open(folder)
    assert not (folder / "pwned").exists()


@pytest.mark.parametrize("keep", [10, 5000, 300_000, -100])
def test_a_truncated_pickle(folder, keep):
    (folder / "pytorch_model.bin").write_bytes((PUBLISHED / "pytorch_model.bin").read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: damaged or cut off.*Download it again"):
        EvaClipCheckpoint.open(folder)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>"])
def test_no_pickle_at_all(folder, content):
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"not a PyTorch file .{len(content)} bytes"):
        EvaClipCheckpoint.open(folder)


def test_a_pickle_of_something_else(folder, state):
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a list, not a table of tensors"):
        EvaClipCheckpoint.open(folder)
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no EVA-CLIP tower, or an incomplete one"):
        EvaClipCheckpoint.open(folder)


@pytest.mark.parametrize("kind", ["pickle", "safetensors"])
def test_missing_and_misshapen_tensors_are_listed(folder, state, kind):
    content = {name: tensor.clone() for name, tensor in state.items()}
    del content["blocks.1.attn.qkv.bias"]
    content["blocks.0.norm1.weight"] = torch.zeros(47)
    if kind == "pickle":
        torch.save(content, folder / "pytorch_model.bin")
    else:
        save_file(content, folder / "model.safetensors")
    listed = r"1 missing: blocks.1.attn.qkv.bias; 1 misshapen: blocks.0.norm1.weight is \[47\], expected \[48\]"
    with pytest.raises(CheckpointError, match=listed):
        EvaClipCheckpoint.open(folder)


def test_safetensors_may_hold_nothing_else(folder, state):
    save_file({**{name: tensor.clone() for name, tensor in state.items()}, "text.x": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="1 unexpected: text.x"):
        EvaClipCheckpoint.open(folder)


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"])
def test_a_tensor_that_gives_the_sizes_is_missing(folder, state, name):
    torch.save({key: tensor for key, tensor in state.items() if key != name}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=rf"incomplete one; its sizes can't be read .'{re.escape(name)}'"):
        EvaClipCheckpoint.open(folder)


def test_a_missing_block(folder, state):
    torch.save({key: tensor for key, tensor in state.items() if not key.startswith("blocks.1.")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="12 missing: blocks.1.attn"):  # config.json says 2 layers
        EvaClipCheckpoint.open(folder)
    (folder / "pytorch_model.bin").unlink()
    far = {key.replace("blocks.1.", "blocks.999999999."): tensor.clone() for key, tensor in state.items()}
    save_file(far, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="2 blocks numbered up to 999999999"):
        EvaClipCheckpoint.open(folder)


def test_values_that_are_not_finite(folder, state):
    broken = {**state, "pos_embed": torch.full_like(state["pos_embed"], float("nan"))}
    torch.save(broken, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pos_embed holds nan or infinite values"):
        load(folder)
    torch.save({**state, "pos_embed": torch.full_like(state["pos_embed"], 1e6)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pos_embed holds nan or infinite values.*use bfloat16"):
        load(folder, torch.float16)


def test_a_file_that_changes_between_opening_and_loading(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    opened = EvaClipCheckpoint.open(folder)
    (folder / "pytorch_model.bin").unlink()
    torch.save({**state, "cls_token": torch.zeros(1, 1, 7)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cls_token has changed since the file was opened"):
        opened.load(dtype=torch.float32)


# --- config.json


def test_a_wrong_head_width(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    edit_config(folder, head_width=36)
    with pytest.raises(CheckpointError, match="width 48 can't have heads of width 36"):
        EvaClipCheckpoint.open(folder)
    (folder / "config.json").unlink()  # the published 112 is assumed
    with pytest.raises(CheckpointError, match="heads of width 112.*put a config.json with head_width beside"):
        EvaClipCheckpoint.open(folder)


def test_fields_of_config_json_win_over_the_tensors(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    edit_config(folder, layer_norm_eps=1e-5, unknown_field="kept out")
    assert EvaClipCheckpoint.open(folder).config.layer_norm_eps == 1e-5
    for changes, message in (({"layers": 3}, "12 missing: blocks.2"),
                             ({"mlp_ratio": 2.0}, "misshapen: blocks.0.mlp.fc1.bias is .192., expected .96."),
                             ({"image_size": 224}, "pos_embed is .1, 1025, 48., expected .1, 257, 48.")):  # fmt: skip
        shutil.copy(PUBLISHED / "config.json", folder / "config.json")
        edit_config(folder, **changes)
        with pytest.raises(CheckpointError, match=message):
            EvaClipCheckpoint.open(folder)


@pytest.mark.parametrize("changes", [{"head_width": 0}, {"head_width": "12"}, {"layers": 2.5}, {"width": True}, {"mlp_ratio": None},
                                     {"layer_norm_eps": -1e-6}])  # fmt: skip
def test_a_config_json_of_nonsense(folder, state, changes):
    torch.save(state, folder / "pytorch_model.bin")
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=f"{next(iter(changes))} in config.json is"):
        EvaClipCheckpoint.open(folder)


def test_a_damaged_config_json(folder, state):
    torch.save(state, folder / "pytorch_model.bin")
    for content, message in (("{", "not readable as JSON"), ("[1]", "holds no table of settings")):
        (folder / "config.json").write_text(content, "utf-8")
        with pytest.raises(CheckpointError, match=message):
            EvaClipCheckpoint.open(folder)


# --- places


def test_places_without_a_tower(tmp_path, state):
    with pytest.raises(CheckpointError, match="no such file or folder. Download jiuhai/eva_clip_vision_tower"):
        EvaClipCheckpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="this one neither"):
        EvaClipCheckpoint.open(tmp_path)
    (tmp_path / "weights.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not a file of weights"):
        EvaClipCheckpoint.open(tmp_path / "weights.txt")
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match="2 safetensors files; give the right one itself"):
        EvaClipCheckpoint.open(tmp_path)


def test_a_root_checkpoint_without_a_tower(tmp_path):
    with pytest.raises(CheckpointError, match="holds no EVA-CLIP tower. Download"):
        EvaClipCheckpoint.from_entries({}, tmp_path)


def test_two_towers_in_one_file(folder, state):
    content = {**{name: tensor.clone() for name, tensor in state.items()}, "visual.cls_token": torch.zeros(1, 1, 48)}
    save_file(content, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds both cls_token and visual.cls_token"):
        EvaClipCheckpoint.open(folder)
