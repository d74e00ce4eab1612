"""Files of weights: cut off, with flipped bits, of other shapes, with headers that lie, with indices that lead nowhere."""

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
from hypothesis import strategies as st

from .damage import byte_changes, changed, damaged, header_changes, json_changes, odd_values, remake, with_header, with_tensor

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT, DECODER, SANA, EVA = (DATA / name for name in ("sdxl/checkpoint", "sdxl/checkpoint/diffusion-decoder", "sana/checkpoint",
                                                           "sdxl/eva_clip_vision_tower"))  # fmt: skip
WEIGHTS = "model.safetensors"
PARTS = ("unet", "vae")
LONG = st.sampled_from([0, 1, 2, 8, 100_000_000, 100_000_001, 2**31, 2**63 - 1, 2**64 - 1])
MANY = st.integers(0, 10**12)
NAMES = st.one_of(
    st.builds("model.layers.{}.mlp.up_proj.weight".format, MANY), st.builds("model.dit.model.layers.{}.gate".format, MANY),
    st.builds("visual.blocks.{}.norm1.weight".format, MANY), st.builds("model.{}".format, st.text(max_size=20)), st.text(max_size=40),
    st.builds("model.layers.0.{}.weight_scale".format, st.sampled_from(["mlp.up_proj", "self_attn.q_proj", "input_layernorm"])),
    st.builds("model.gen_vision_tower.vision_tower.model.blocks.{}.norm1.weight".format, MANY),
)  # fmt: skip


def test_bytes_of_the_weights(fuzz, worker, tmp_path):
    whole = (CHECKPOINT / WEIGHTS).read_bytes()

    def check(changes):
        return worker(fuzz, "checkpoint", folder=str(remake(tmp_path / "model", CHECKPOINT, {WEIGHTS: damaged(whole, changes)})))

    fuzz(check, ci=19, nightly=250, changes=byte_changes())


def test_headers_of_the_weights(fuzz, worker, tmp_path):
    whole = (CHECKPOINT / WEIGHTS).read_bytes()

    def check(changes, length):
        folder = remake(tmp_path / "model", CHECKPOINT, {WEIGHTS: with_header(whole, changes, length)})
        return worker(fuzz, "checkpoint", folder=str(folder))

    fuzz(check, ci=22, nightly=300, changes=header_changes(), length=st.one_of(st.none(), st.none(), st.none(), LONG))


def test_names_in_the_weights(fuzz, worker, tmp_path):
    whole = (CHECKPOINT / WEIGHTS).read_bytes()

    def check(name):
        return worker(fuzz, "checkpoint", folder=str(remake(tmp_path / "model", CHECKPOINT, {WEIGHTS: with_tensor(whole, name)})))

    fuzz(check, ci=13, nightly=100, name=NAMES)


SHARDS = st.one_of(
    st.sampled_from(["model.safetensors.index.json", "config.json", ".", "..", "", "../checkpoint/model.safetensors", "/etc/passwd", "a/b",
                     "\\\\host\\share", "C:\\model.safetensors", "loop", "fifo", "folder", "zero", "absent.safetensors", "x" * 300,
                     "model.safetensors\0"]),
    odd_values(),
)  # fmt: skip


def test_indices_of_shards(fuzz, worker, tmp_path):
    """An index of two shards, which name themselves, each other, the index, devices and what is outside."""
    size = struct.unpack("<Q", (CHECKPOINT / WEIGHTS).read_bytes()[:8])[0]
    names = [name for name in json.loads((CHECKPOINT / WEIGHTS).read_bytes()[8 : 8 + size]) if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}

    def check(changes, raw):
        folder = remake(tmp_path / "model", CHECKPOINT, {})
        (folder / WEIGHTS).rename(folder / "model-1.safetensors")
        (folder / "loop").symlink_to("loop")
        (folder / "zero").symlink_to("/dev/zero")
        (folder / "folder").mkdir()
        os.mkfifo(folder / "fifo")
        text = json.dumps(changed(index, changes)).encode()
        (folder / "model.safetensors.index.json").write_bytes(text if raw is None else damaged(text, raw))
        return worker(fuzz, "checkpoint", folder=str(folder))

    fuzz(check, ci=22, nightly=250, changes=json_changes(SHARDS), raw=st.one_of(st.none(), st.none(), byte_changes()))


def test_weights_of_the_decoder(fuzz, worker, tmp_path):
    files = {part: f"diffusion-decoder/{part}/diffusion_pytorch_model.bf16.safetensors" for part in PARTS}
    whole = {part: (CHECKPOINT / file).read_bytes() for part, file in files.items()}

    def check(part, header, raw):
        content = with_header(whole[part], header) if raw is None else damaged(whole[part], raw)
        return worker(fuzz, "checkpoint", folder=str(remake(tmp_path / "model", CHECKPOINT, {files[part]: content})))

    fuzz(check, ci=13, nightly=150, part=st.sampled_from(PARTS), header=header_changes(), raw=st.one_of(st.none(), byte_changes()))


def test_weights_of_a_sana_decoder(fuzz, worker, tmp_path):
    whole = (SANA / WEIGHTS).read_bytes()

    def check(header, raw):
        content = with_header(whole, header) if raw is None else damaged(whole, raw)
        return worker(fuzz, "sana_decoder", folder=str(remake(tmp_path / "decoder", SANA, {WEIGHTS: content})))

    fuzz(check, ci=13, nightly=150, header=header_changes(), raw=st.one_of(st.none(), byte_changes()))


def test_the_pickle_of_a_vision_tower(fuzz, worker, tmp_path):
    """Bytes of the archive, bytes of the pickle in it, and pickles of plain data."""
    file = "pytorch_model.bin"
    whole = (EVA / file).read_bytes()
    with zipfile.ZipFile(EVA / file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    [inner] = [name for name in members if name.endswith("data.pkl")]

    def check(where, raw, value):
        if where == "value":
            content = pickle.dumps(value)
        elif where == "archive":
            content = damaged(whole, raw)
        else:
            with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
                for name, member in members.items():
                    archive.writestr(name, damaged(member, raw) if name == inner else member)
            content = (tmp_path / "changed.zip").read_bytes()
        return worker(fuzz, "vision_tower", path=str(remake(tmp_path / "tower", EVA, {file: content})))

    fuzz(check, ci=19, nightly=250, where=st.sampled_from(["archive", "pickle", "pickle", "value"]), raw=byte_changes(), value=odd_values())


@pytest.mark.parametrize("kind", ["fifo", "device", "loop", "folder"])
def test_weights_that_are_no_file(worker, fuzz_once, tmp_path, kind):
    folder = remake(tmp_path / "model", CHECKPOINT, {})
    (folder / WEIGHTS).unlink()
    {"fifo": lambda: os.mkfifo(folder / WEIGHTS), "device": lambda: (folder / WEIGHTS).symlink_to("/dev/zero"),
     "loop": lambda: (folder / WEIGHTS).symlink_to(WEIGHTS), "folder": lambda: (folder / WEIGHTS).mkdir()}[kind]()  # fmt: skip
    assert worker(fuzz_once, "checkpoint", folder=str(folder)) == "refused"
