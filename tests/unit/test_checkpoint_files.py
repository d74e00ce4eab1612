"""Reading safetensors: what is good is mapped without a copy, what is bad is named with its fix."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from blip3o_core import CheckpointError
from blip3o_core.checkpoint.load import fill
from blip3o_core.checkpoint.shards import CONVERT_CHUNK_BYTES, map_tensor, open_shards, read_header, read_tensor


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "float32": torch.randn(5, 7, generator=generator),
        "bfloat16": torch.randn(3, 3, generator=generator).bfloat16(),
        "int64": torch.arange(9),
        "bool": torch.tensor([True, False, True]),
        "large": torch.randn(CONVERT_CHUNK_BYTES // 4 + 1000, generator=generator),
    }


def test_every_tensor_reads_back_bit_for_bit(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    entries = read_header(tmp_path / "model.safetensors")
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert entries[name].shape == tuple(tensor.shape)
        assert torch.equal(read_tensor(entries[name]), tensor)


def test_conversion_in_pieces_equals_conversion_at_once(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    entry = read_header(tmp_path / "model.safetensors")["large"]
    assert torch.equal(read_tensor(entry, dtype=torch.bfloat16), tensors["large"].bfloat16())


def test_changing_a_mapped_tensor_leaves_the_file_alone(tensors, tmp_path):
    save_file(tensors, tmp_path / "model.safetensors")
    entry = read_header(tmp_path / "model.safetensors")["float32"]
    map_tensor(entry).zero_()
    assert torch.equal(map_tensor(entry), tensors["float32"])


def test_shards_are_found_through_either_index_name(tensors, tmp_path):
    names = list(tensors)
    save_file({name: tensors[name] for name in names[:3]}, tmp_path / "w-1.safetensors")
    save_file({name: tensors[name] for name in names[3:]}, tmp_path / "w-2.safetensors")
    weight_map = {name: "w-1.safetensors" if name in names[:3] else "w-2.safetensors" for name in names}
    for index in ("w.bf16.safetensors.index.json", "w.safetensors.index.bf16.json"):  # transformers, diffusers
        (tmp_path / index).write_text(json.dumps({"weight_map": weight_map}))
        assert open_shards(tmp_path, "w", ("bf16", "")).keys() == tensors.keys()
        (tmp_path / index).unlink()


def damaged_header(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cut off inside its header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (struct.pack("<Q", 2**40) + b"{}", "cut off inside its header"),
        (damaged_header(b'{"a": '), "header is damaged"),
        (damaged_header(b"[1, 2]"), "no table of tensors"),
        (damaged_header(b'{"a": {"dtype": "F32", "shape": [2]}}'), "entry of 'a' is damaged"),
        (damaged_header(b'{"a": {"dtype": "F9", "shape": [2], "data_offsets": [0, 8]}}'), "entry of 'a' is damaged"),
        (damaged_header(b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}') + bytes(8), "8 bytes"),
        (damaged_header(b'{"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}') + bytes(8), "shape"),
        (damaged_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}') + bytes(7), "cut off at"),
    ],
)
def test_a_damaged_file_is_named_with_what_to_do(tmp_path, content, message):
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(file) in str(caught.value)
    assert "ownload" in str(caught.value)


def test_a_missing_shard_is_named(tensors, tmp_path):
    save_file({"a": tensors["float32"]}, tmp_path / "model-1.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="1 of 2 shards are missing: model-2.safetensors"):
        open_shards(tmp_path, "model")


@pytest.mark.parametrize("shard", ["../other.safetensors", "/etc/passwd", "..", "a\\b.safetensors"])
def test_an_index_can_not_point_out_of_its_folder(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="outside of its own folder"):
        open_shards(tmp_path, "model")


def test_an_index_that_names_a_tensor_its_shard_lacks(tensors, tmp_path):
    save_file({"a": tensors["float32"]}, tmp_path / "model-1.safetensors")
    weight_map = {"a": "model-1.safetensors", "ghost": "model-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="first ghost in model-1.safetensors"):
        open_shards(tmp_path, "model")


def test_one_error_lists_everything_that_does_not_fit(tmp_path):
    save_file({"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        layer = torch.nn.Linear(2, 4)
    with pytest.raises(CheckpointError) as caught:
        fill(layer, read_header(tmp_path / "model.safetensors"), component="layer", source=tmp_path, dtype=torch.float32)
    for part in ("1 missing: bias", "1 unexpected: extra", "1 misshapen: weight is [3, 2], expected [4, 2]"):
        assert part in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, bad):
    save_file({"weight": torch.tensor([[1.0, bad], [0.0, 2.0]]), "bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        layer = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="weight holds nan or infinite"):
        fill(layer, read_header(tmp_path / "model.safetensors"), component="layer", source=tmp_path, dtype=torch.float32)
