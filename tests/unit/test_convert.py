"""A checkpoint becomes files in ComfyUI's folders, each of which works, and the same checkpoint again."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from blip3o_core import Blip3oPipeline
from blip3o_core.checkpoint.shards import open_shards, read_tensor
from blip3o_core.cli.main import main
from blip3o_core.errors import CheckpointError, InputError
from blip3o_core.variants import convert
from blip3o_core.variants.blip3o import NANO_FOLDER, Blip3oCheckpoint
from blip3o_core.variants.eva_clip import SETTINGS, EvaClipCheckpoint

from ..conftest import FIRST_OWN_TOKEN

QWEN, EVA, FOLDER = "text_encoders/small_qwen2.5_vl.safetensors", "clip_vision/small_eva_clip.safetensors", "blip3o/small"


def convert_to(models: Path, model: Path, *options: str) -> int:
    models.mkdir(exist_ok=True)
    return main(["convert", str(model), "--comfyui", str(models), "--name", "small", *options])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the parts of nano, which has an EVA-CLIP tower in its shards as the published models do."""
    folder = tmp_path_factory.mktemp("comfyui") / "models"
    assert convert_to(folder, NANO_FOLDER) == 0
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in open_shards(folder, "model").items()}


def test_the_parts_are_the_model(models, photograph):
    assert sorted(str(file.relative_to(models)) for file in models.glob("*/*")) == sorted([QWEN, EVA, FOLDER])
    found = Blip3oPipeline.from_pretrained(models / FOLDER, device="cpu", qwen=models / QWEN, vision_encoder=models / EVA)
    pipe = Blip3oPipeline.from_pretrained(NANO_FOLDER, device="cpu")
    assert torch.equal(found.encode_prompt(["a cat"]), pipe.encode_prompt(["a cat"]))
    assert torch.equal(found.embed_image([photograph]), pipe.embed_image([photograph]))
    small = {"steps": 2, "decoder_steps": 1, "width": 64, "height": 64, "negative": "zeros"}
    assert found.generate(["a cat"], seeds=[1], **small)[0].tobytes() == pipe.generate(["a cat"], seeds=[1], **small)[0].tobytes()
    assert found.checkpoint.fingerprint == pipe.checkpoint.fingerprint


def test_the_language_model_is_stored_as_its_publisher_does(tiny_checkpoint, monkeypatch, tmp_path):
    assert convert_to(tmp_path / "first", tiny_checkpoint) == 0
    assert not (tmp_path / "first" / "clip_vision").exists(), "the tiny checkpoint has its tower elsewhere"
    original, found = tensors_of(tiny_checkpoint), load_file(tmp_path / "first" / QWEN)
    assert {name.split(".")[0] for name in found} == {"model", "visual", "lm_head"}
    assert not [name for name in found if "dit" in name or "latent" in name or "gen_vision" in name]
    for name, tensor in found.items():
        expected = original[name][:FIRST_OWN_TOKEN] if name in ("model.embed_tokens.weight", "lm_head.weight") else original[name]
        assert torch.equal(tensor, expected), name
    monkeypatch.setitem(convert.QWEN_ROWS, 64, FIRST_OWN_TOKEN + 30)  # as many rows as the original: more than tokens
    assert convert_to(tmp_path / "models", tiny_checkpoint) == 0
    matrix = load_file(tmp_path / "models" / QWEN)["model.embed_tokens.weight"]
    assert len(matrix) == FIRST_OWN_TOKEN + 30 and matrix[FIRST_OWN_TOKEN:].count_nonzero() == 0
    assert torch.equal(matrix[:FIRST_OWN_TOKEN], found["model.embed_tokens.weight"])
    Blip3oCheckpoint.open(tmp_path / "models" / FOLDER, qwen=tmp_path / "models" / QWEN)


@pytest.mark.parametrize("source", ["tiny", "nano"])
def test_there_and_back_is_the_same_checkpoint(source, tiny_checkpoint, tmp_path):
    model = tiny_checkpoint if source == "tiny" else NANO_FOLDER
    models, again = tmp_path / "models", tmp_path / "again"
    assert convert_to(models, model) == 0
    parts = ["--qwen", str(models / QWEN), *(["--vision-encoder", str(models / EVA)] if source == "nano" else [])]
    assert main(["convert", str(models / FOLDER), *parts, "--output", str(again)]) == 0
    before, after = tensors_of(model), tensors_of(again)
    assert {name: tensor.dtype for name, tensor in after.items()} == {name: tensor.dtype for name, tensor in before.items()}
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    for file in (file for file in model.rglob("*") if file.is_file() and not file.name.startswith(("model", "README", "."))):
        other = again / file.relative_to(model)
        if file.name == "config.json" and file.parent == model:
            own = json.loads(other.read_text("utf-8"))
            assert own == json.loads(file.read_text("utf-8"))
        else:
            assert other.read_bytes() == file.read_bytes(), file
    if source == "nano":
        assert Blip3oCheckpoint.open(again).vision_encoder_source().config == EvaClipCheckpoint.open(models / EVA).config
    assert sorted(file.name for file in again.glob("*.safetensors")) == ["model-00001-of-00001.safetensors"]


def test_nothing_is_overwritten_unless_asked(tmp_path, capsys):
    models = tmp_path / "models"
    (models / "clip_vision").mkdir(parents=True)
    (models / EVA).write_bytes(b"somebody's")
    assert convert_to(models, NANO_FOLDER) == 1
    assert "small_eva_clip.safetensors exists" in capsys.readouterr().err
    assert [file.name for file in models.rglob("*") if file.is_file()] == ["small_eva_clip.safetensors"], "found before anything is written"
    assert convert_to(models, NANO_FOLDER, "--overwrite") == 0
    assert len(EvaClipCheckpoint.open(models / EVA).entries) > 0
    assert main(["convert", str(models / FOLDER), "--qwen", str(models / QWEN), "--output", str(models / "blip3o")]) == 1
    assert "exists and is not empty" in capsys.readouterr().err and (models / FOLDER).is_dir()


def test_bad_input(models, tiny_checkpoint, split_checkpoint, qwen, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert main(["convert", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "there is no such folder. Give ComfyUI's folder" in refused(tiny_checkpoint, "--comfyui", tmp_path / "nowhere")
    for name in ("../up", "a/b", ".hidden", "end.", ""):
        assert "is no name for files" in refused(tiny_checkpoint, "--comfyui", tmp_path, "--name", name)
    assert "--qwen" in refused(split_checkpoint, "--comfyui", tmp_path)
    assert "goes with --output" in refused(tiny_checkpoint, "--comfyui", tmp_path, "--qwen", qwen)
    assert "goes with --comfyui" in refused(split_checkpoint, "--output", tmp_path / "out", "--name", "other")
    assert "is a complete folder already" in refused(tiny_checkpoint, "--output", tmp_path / "out")
    inside = tmp_path / "inside" / "blip3o"
    inside.mkdir(parents=True)
    (inside / "small").symlink_to(tiny_checkpoint)
    assert "is the model itself" in refused(inside / "small", "--comfyui", inside.parent, "--overwrite")
    assert not (tmp_path / "out").exists() and not (tmp_path / "text_encoders").exists()


def test_fewer_bits_are_refused(tiny_checkpoint, tmp_path):
    assert main(["quantize", str(tiny_checkpoint), "--format", "int8", "--output", str(tmp_path / "int8")]) == 0
    quantised = Blip3oCheckpoint.open(tmp_path / "int8")
    with pytest.raises(InputError, match="is quantised. Give the model that it was made from"):
        convert.write_comfyui(quantised, tmp_path, "small")
    assert main(["split", str(tmp_path / "int8"), "--output", str(tmp_path / "split")]) == 1
    assert not (tmp_path / "split").exists()


def test_settings_in_the_header_are_checked(models, tmp_path):
    file = tmp_path / "eva.safetensors"
    file.write_bytes((models / EVA).read_bytes().replace(SETTINGS.encode() + b'":"{', SETTINGS.encode() + b'":"['))
    with pytest.raises(CheckpointError, match="is no table of settings"):
        EvaClipCheckpoint.open(file)


def test_what_a_killed_conversion_left_is_removed(tiny_checkpoint, tmp_path):
    left, fresh = (tmp_path / "models" / "text_encoders" / f".blip3o-{name}.tmp" for name in ("left", "fresh"))
    left.parent.mkdir(parents=True)
    for file in (left, fresh):
        file.write_bytes(b"half")
    os.utime(left, (0, 0))
    assert convert_to(tmp_path / "models", tiny_checkpoint) == 0
    assert not left.exists() and fresh.exists(), "another conversion may be writing the fresh one"
