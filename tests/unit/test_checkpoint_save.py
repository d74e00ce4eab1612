"""Derived checkpoints: complete, linked where nothing changed, whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blip3o_core import Blip3oPipeline
from blip3o_core.checkpoint.save import Deferred, save_derived, whole_folder, write_safetensors
from blip3o_core.checkpoint.shards import open_shards, read_header, read_tensor
from blip3o_core.errors import OutputError
from blip3o_core.variants.sdxl_decoder import SdxlDecoderCheckpoint

from ..conftest import command_environment

MATRIX, NORM = "model.dit.model.layers.0.attn1.to_q.weight", "model.dit.model.layers.0.norm2.weight"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def values(folder: Path) -> dict[str, torch.Tensor]:
    return {name: read_tensor(entry) for name, entry in open_shards(folder, "model").items()}


@pytest.fixture
def sharded(checkpoint_copy) -> Path:
    """The tiny checkpoint in three shards with an index, as the published ones."""
    tensors = load_file(checkpoint_copy / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for index in range(3):
        file = f"model-{index + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[index::3]}, checkpoint_copy / file)
        weight_map |= dict.fromkeys(names[index::3], file)
    (checkpoint_copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")
    (checkpoint_copy / "model.safetensors").unlink()
    return checkpoint_copy


@pytest.mark.parametrize("layout", ["tiny_checkpoint", "sharded"])
def test_a_derived_checkpoint_has_the_new_tensors_and_all_others(request, tmp_path, layout):
    source = request.getfixturevalue(layout)
    before = contents(source)
    old = values(source)
    new = {MATRIX: torch.full((48, 48), 0.5, dtype=torch.bfloat16), NORM: torch.ones(48)}
    save_derived(source, tmp_path / "out", new, open_shards(source, "model"))
    saved = values(tmp_path / "out")
    assert saved.keys() == old.keys()
    assert saved[MATRIX].dtype == torch.bfloat16
    for name, tensor in saved.items():
        assert torch.equal(tensor, new.get(name, old[name])), name
    assert contents(source) == before
    files = contents(tmp_path / "out")
    assert "model.safetensors" not in files  # other readers would prefer it to the index
    others = {name for name in before if not name.startswith("model")}
    assert len(others) > 8 and all(files[name] == before[name] for name in others)
    index = json.loads(files["model.safetensors.index.json"])
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in saved.values())
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_unchanged_files_are_hard_links(sharded, tmp_path):
    save_derived(sharded, tmp_path / "out", {NORM: torch.ones(48)}, open_shards(sharded, "model"))
    for name in ("model-00001-of-00003.safetensors", "vocab.json", "diffusion-decoder/unet/diffusion_pytorch_model.bf16.safetensors"):
        assert (sharded / name).samefile(tmp_path / "out" / name), name
    assert (tmp_path / "out" / "model-updated-00001-of-00001.safetensors").stat().st_nlink == 1
    shutil.rmtree(sharded)  # the links stand alone
    Blip3oPipeline.from_pretrained(tmp_path / "out", device="cpu").backbone  # noqa: B018


def test_where_links_are_impossible_files_are_copied(tiny_checkpoint, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)  # a second file system is not to be had everywhere
    save_derived(tiny_checkpoint, tmp_path / "out", {NORM: torch.ones(48)}, open_shards(tiny_checkpoint, "model"))
    assert not (tmp_path / "out" / "vocab.json").samefile(tiny_checkpoint / "vocab.json")
    assert torch.equal(values(tmp_path / "out")[MATRIX], values(tiny_checkpoint)[MATRIX])


def test_names_in_a_download_cache_are_followed_to_their_files(tiny_checkpoint, tmp_path):
    snapshot = tmp_path / "snapshot"
    shutil.copytree(tiny_checkpoint / "diffusion-decoder", snapshot / "diffusion-decoder")
    (tmp_path / "blobs").mkdir()
    for path in tiny_checkpoint.iterdir():
        if path.is_file():
            shutil.copyfile(path, tmp_path / "blobs" / path.name)
            (snapshot / path.name).symlink_to(f"../blobs/{path.name}")
    (snapshot / ".cache").mkdir()
    save_derived(snapshot, tmp_path / "out", {NORM: torch.ones(48)}, open_shards(snapshot, "model"))
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert not (tmp_path / "out" / ".cache").exists()
    assert values(tmp_path / "out").keys() == values(tiny_checkpoint).keys()


def test_large_changes_are_split_into_shards(tiny_checkpoint, tmp_path):
    entries = open_shards(tiny_checkpoint, "model")
    save_derived(tiny_checkpoint, tmp_path / "out", {name: Deferred.stored(entry) for name, entry in entries.items()}, entries,
                 max_shard_bytes=200_000)  # fmt: skip
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-updated-00001-of-{len(shards):05d}.safetensors"  # the old file holds nothing more
    for name in shards:
        header = read_header(tmp_path / "out" / name).values()
        assert sum(entry.nbytes for entry in header) <= 200_000 or len(header) == 1
    old = values(tiny_checkpoint)
    assert all(torch.equal(tensor, old[name]) for name, tensor in values(tmp_path / "out").items())


def test_a_derived_checkpoint_can_be_derived_from(tiny_checkpoint, tmp_path):
    save_derived(tiny_checkpoint, tmp_path / "one", {NORM: torch.ones(48)}, open_shards(tiny_checkpoint, "model"))
    save_derived(tmp_path / "one", tmp_path / "two", {MATRIX: torch.ones(48, 48)}, open_shards(tmp_path / "one", "model"))
    last = values(tmp_path / "two")
    assert last[NORM].eq(1).all() and last[MATRIX].eq(1).all()
    assert sorted(path.name for path in (tmp_path / "two").glob("*.safetensors")) == [
        "model-base.safetensors", "model-updated-00001-of-00001.safetensors", "model-updated2-00001-of-00001.safetensors"
    ]  # fmt: skip


def test_decoder_weights_and_configurations_are_replaced(tiny_checkpoint, tmp_path):
    source = SdxlDecoderCheckpoint.open(tiny_checkpoint)
    unet_name, vae_name = "conv_in.bias", "decoder.conv_in.bias"
    before = contents(tiny_checkpoint)
    save_derived(
        tiny_checkpoint, tmp_path / "out", {}, open_shards(tiny_checkpoint, "model"),
        decoder_tensors={"unet": {unet_name: torch.ones(source.unet[unet_name].shape)},
                         "vae": {vae_name: torch.ones(source.vae[vae_name].shape)}},
        config_changes={"diffusion-decoder/vae/config.json": {"scaling_factor": 0.5}, "config.json": {"trained": True}},
    )  # fmt: skip
    assert contents(tiny_checkpoint) == before
    saved = SdxlDecoderCheckpoint.open(tmp_path / "out")
    assert saved.vae_config["scaling_factor"] == 0.5 and source.vae_config["scaling_factor"] != 0.5
    assert json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["trained"]
    for old, new, changed in ((source.unet, saved.unet, unet_name), (source.vae, saved.vae, vae_name)):
        assert {entry.file.name for entry in new.values()} == {"diffusion_pytorch_model.safetensors"}
        assert old.keys() == new.keys()
        for name, entry in new.items():
            value = read_tensor(entry)
            assert value.eq(1).all() if name == changed else torch.equal(value, read_tensor(old[name])), name
    pipe = Blip3oPipeline.from_pretrained(tmp_path / "out", device="cpu")
    assert len(pipe.generate(["a cat"], width=64, height=64, steps=1, decoder_steps=1)) == 1


def test_a_decoder_from_elsewhere_takes_the_place_of_the_own_one(tiny_checkpoint, checkpoint_copy, tmp_path, edit_tensors):
    name = "conv_in.bias"
    weights = checkpoint_copy / "diffusion-decoder" / "unet" / "diffusion_pytorch_model.bf16.safetensors"
    edit_tensors(weights, lambda tensors: tensors[name].fill_(9))
    before = contents(tiny_checkpoint)
    entries = open_shards(tiny_checkpoint, "model")
    save_derived(tiny_checkpoint, tmp_path / "out", {}, entries, decoder=checkpoint_copy / "diffusion-decoder")
    assert read_tensor(SdxlDecoderCheckpoint.open(tmp_path / "out").unet[name]).eq(9).all()
    assert contents(tiny_checkpoint) == before
    shutil.rmtree(checkpoint_copy / "diffusion-decoder")
    save_derived(checkpoint_copy, tmp_path / "second", {}, entries, decoder=tiny_checkpoint / "diffusion-decoder")
    assert SdxlDecoderCheckpoint.open(tmp_path / "second").unet.keys() == SdxlDecoderCheckpoint.open(tiny_checkpoint).unet.keys()


def test_nothing_is_ever_written_into_a_file_that_is_there(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"weights")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    assert (tmp_path / "a.safetensors").read_bytes() == b"weights"


def test_files_that_no_index_lists_keep_their_names(checkpoint_copy, tmp_path):
    (checkpoint_copy / "model-base.safetensors").write_bytes(b"something else")
    save_derived(checkpoint_copy, tmp_path / "out", {NORM: torch.ones(48)}, open_shards(checkpoint_copy, "model"))
    assert (tmp_path / "out" / "model-base.safetensors").read_bytes() == b"something else"
    assert torch.equal(values(tmp_path / "out")[MATRIX], values(checkpoint_copy)[MATRIX])


def test_what_exists_is_not_replaced_unless_it_is_a_checkpoint_and_told_so(tiny_checkpoint, checkpoint_copy, tmp_path):
    entries = open_shards(tiny_checkpoint, "model")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    for output, overwrite, message in (
        (checkpoint_copy, False, "exists and is not empty"), (tmp_path / "notes", True, "holds files but no checkpoint"),
        (tmp_path / "notes" / "a.txt", True, "is a file"), (tiny_checkpoint, True, "is, or lies in, the checkpoint"),
        (tiny_checkpoint / "sub", False, "is, or lies in, the checkpoint"),
    ):  # fmt: skip
        with pytest.raises(OutputError, match=message):
            save_derived(tiny_checkpoint, output, {NORM: torch.ones(48)}, entries, overwrite=overwrite)
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    assert (checkpoint_copy / "model.safetensors").exists()
    save_derived(tiny_checkpoint, checkpoint_copy, {NORM: torch.ones(48)}, entries, overwrite=True)
    assert values(checkpoint_copy)[NORM].eq(1).all() and not (checkpoint_copy / "model.safetensors").exists()
    (tmp_path / "empty").mkdir()
    save_derived(tiny_checkpoint, tmp_path / "empty", {NORM: torch.ones(48)}, entries)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "empty", "notes"]


def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(tiny_checkpoint, tmp_path):
    """The limit on file sizes stands for a full disk: both fail in the middle of a write."""
    pytest.importorskip("resource", reason="file size limits are of Unix")
    shutil.copytree(tiny_checkpoint, tmp_path / "there")
    before = contents(tmp_path / "there")
    script = f"""
import resource, torch
from pathlib import Path
from blip3o_core.checkpoint.save import save_derived
from blip3o_core.checkpoint.shards import open_shards
from blip3o_core.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
source = Path({str(tiny_checkpoint)!r})
for name in ("new", "there"):
    try:
        output = Path({str(tmp_path)!r}) / name
        save_derived(source, output, {{"model.extra": torch.ones(100_000)}}, open_shards(source, "model"), overwrite=True)
    except OutputError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                            env=command_environment())  # fmt: skip
    assert result.stdout.count("can't be written (File too large)") == 2, result.stdout + result.stderr
    assert contents(tmp_path / "there") == before
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_an_interrupted_folder_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_the_format_s_own_reader_reads_what_is_written(tmp_path):
    tensors = {
        "bool": torch.tensor([True, False, True]), "half": torch.randn(3, 5).half(), "scalar": torch.tensor(2.5),
        "fp8": torch.ones(3).to(torch.float8_e4m3fn), "empty": torch.empty(0, 4), "turned": torch.randn(4, 6).T, "long": torch.arange(3),
    }  # fmt: skip
    write_safetensors(tmp_path / "a.safetensors", tensors, {"key": "ü"})
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"key": "ü"}
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].float(), tensor.float()), name
    assert all(entry.offset % entry.dtype.itemsize == 0 for entry in read_header(tmp_path / "a.safetensors").values())
