"""Ways in which files and values are damaged, as hypothesis strategies. What is drawn is small and printable; files are damaged with it."""

import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

ODD_NUMBERS = (0, 1, -1, 2, 3, 7, 64, 255, 10**6, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
               0.5, -0.0, 1.5, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"))  # fmt: skip
ODD_TEXTS = ("", " ", "0", "-1", "nan", "None", "true", "1e999", "9" * 5000, "x" * 10_000, "\0", "\x1b[2J", "a\nb", "é", "漢字",
             "\U0001f98a", "\u202etxt", "\ud800", "..", "../../etc/passwd", "/etc/passwd", "C:\\Windows\\win.ini", "file:///etc/passwd",
             "%s%n", "{0}", "silu", "gelu", "float32", "<script>alert(1)</script>", "nano", "~", "$HOME")  # fmt: skip


def odd_values() -> st.SearchStrategy[Any]:
    """What JSON can hold and nobody expects."""
    numbers = st.one_of(st.sampled_from(ODD_NUMBERS), st.integers(), st.floats())
    leaves = st.one_of(st.none(), st.booleans(), numbers, st.sampled_from(ODD_TEXTS), st.text(max_size=20))
    return st.one_of(
        leaves,
        st.lists(leaves, max_size=4),
        st.dictionaries(st.text(max_size=8), leaves, max_size=3),
        st.integers(2, 300).map(nested),
        st.sampled_from([10**3, 10**5]).map(lambda length: [1] * length),
    )


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


@dataclass(frozen=True)
class JsonChange:
    """One place of a document gets another value, another name, or goes. `pick` chooses among all places, whatever their number."""

    pick: int
    kind: str  # replace, remove, rename, move, scale
    value: Any

    def apply(self, document: Any) -> Any:
        places = list(_places(document))
        if not places:
            return self.value
        place, key = places[self.pick % len(places)]
        if self.kind == "replace":
            place[key] = self.value
        elif self.kind == "remove":
            del place[key]
        elif self.kind == "rename" and isinstance(place, dict):
            place[str(self.value)] = place.pop(key)
        elif self.kind == "move":  # the value of another place
            other, other_key = places[(self.pick * 7 + 3) % len(places)]
            place[key], other[other_key] = other[other_key], place[key]
        elif self.kind == "scale" and isinstance(place[key], int | float) and not isinstance(place[key], bool):
            place[key] = place[key] * self.pick % (2**self.pick.bit_length())
        return document


def _places(document: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key or index) of everything in a document, from the outside to the inside."""
    waiting = [document]
    while waiting:
        container = waiting.pop(0)
        keys = list(container) if isinstance(container, dict) else range(len(container)) if isinstance(container, list) else ()
        for key in keys:
            yield container, key
            waiting.append(container[key])


def json_changes(values: st.SearchStrategy[Any] | None = None, most: int = 3) -> st.SearchStrategy[list[JsonChange]]:
    kinds = st.sampled_from(["replace"] * 4 + ["remove", "rename", "move", "scale"])
    change = st.builds(JsonChange, st.integers(0, 2**20), kinds, odd_values() if values is None else values)
    return st.lists(change, min_size=1, max_size=most)


def changed(document: Any, changes: list[JsonChange]) -> Any:
    """A changed copy. A place that an earlier change has made a part of itself ends the changes: JSON has no cycles."""
    document = json.loads(json.dumps(document))
    for change in changes:
        before = json.dumps(document)
        try:
            document = change.apply(document)
            json.dumps(document)
        except (ValueError, RecursionError):
            return json.loads(before)
    return document


@dataclass(frozen=True)
class ByteChange:
    """Of a file: cut at a share of its length, flip bits, overwrite, insert, repeat its beginning."""

    kind: str
    at: float  # 0..1
    content: bytes

    def apply(self, data: bytes) -> bytes:
        place = min(int(self.at * (len(data) + 1)), len(data))
        if self.kind == "cut":
            return data[:place]
        if self.kind == "flip" and place < len(data):
            return data[:place] + bytes([data[place] ^ (self.content[0] if self.content else 1)]) + data[place + 1 :]
        if self.kind == "overwrite":
            return data[:place] + self.content + data[place + len(self.content) :]
        if self.kind == "insert":
            return data[:place] + self.content + data[place:]
        if self.kind == "zeros":
            return data[:place] + bytes(len(data) - place)
        return data


ODD_BYTES = (b"", b"\0", b"\xff", b"\xff" * 8, b"\x00" * 64, b"PK\x03\x04", b"\x80\x04.", b"<html>", b"[" * 3000,
             b"version https://git-lfs.github.com/spec/v1\n", struct.pack("<Q", 2**63), struct.pack("<Q", 99_999_999),
             struct.pack("<I", 2**31 - 1), struct.pack(">I", 2**31 - 1))  # fmt: skip


def byte_changes(most: int = 3) -> st.SearchStrategy[list[ByteChange]]:
    kinds = st.sampled_from(["cut", "flip", "flip", "overwrite", "overwrite", "insert", "zeros"])
    at = st.one_of(st.floats(0, 1), st.floats(0, 0.01), st.sampled_from([0.0, 1.0]))
    change = st.builds(ByteChange, kinds, at, st.one_of(st.binary(max_size=16), st.sampled_from(ODD_BYTES)))
    return st.lists(change, min_size=1, max_size=most)


def damaged(data: bytes, changes: list[ByteChange]) -> bytes:
    for change in changes:
        data = change.apply(data)
    return data


DTYPES = ("F32", "F16", "BF16", "F64", "I64", "U8", "I8", "BOOL", "F8_E4M3", "F4", "U16", "C64")
HEADER_TEXTS = (*DTYPES, "__metadata__", "model.layers.999999999.mlp.up_proj.weight", "model.dit.model.layers.999999999.gate",
                "model.dit.model.layers.-1.gate", "model.dit.model.layers.x.gate", "model.visual.blocks.4000000.norm1.weight",
                "model.latent_queries", "lm_head.weight", "model.embed_tokens.weight_scale", "model.dit.model.", "model.layers.",
                "model.norm.weight_scale", "..weight", "weight")  # fmt: skip


def header_changes() -> st.SearchStrategy[list[JsonChange]]:
    """Of a safetensors header, with names, dtypes, shapes and offsets among the values."""
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 48, 64, 2**31, 2**62, -1]), max_size=5)
    offsets = st.sampled_from([[0, 0], [0, 4], [8, 4], [0, 2**62]])
    entry = st.fixed_dictionaries({"dtype": st.sampled_from(DTYPES), "shape": shapes, "data_offsets": offsets})
    return json_changes(st.one_of(st.sampled_from(HEADER_TEXTS), shapes, entry, odd_values()), most=4)


def with_header(data: bytes, changes: list[JsonChange], length: int | None = None) -> bytes:
    """A safetensors file with a changed header; `length` is what the file says of it."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(changed(json.loads(data[8 : 8 + size]), changes)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data[8 + size :]


def with_tensor(data: bytes, name: str) -> bytes:
    """A safetensors file with one more tensor, which is empty."""
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size]) | {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def remake(folder: Path, source: Path, files: dict[str, bytes]) -> Path:
    """`folder` as a copy of `source`, with some files replaced or added; what isn't changed is linked."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, copy_function=os.symlink)
    for name, content in files.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    return folder
