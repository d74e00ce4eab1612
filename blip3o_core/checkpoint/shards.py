"""safetensors files: headers are read and checked before any tensor, tensors are memory-mapped one by one.

One private mapping per tensor (not one per file) keeps resident memory honest: a tensor that is converted to another
dtype or device is unmapped at once, so its file pages never add up beside the converted copy.
"""

import json
import math
import mmap
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..errors import CheckpointError
from .json_files import read_table

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
SCALE = "weight_scale"  # beside a quantised weight: see models/quantised.py
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_NAME_BYTES = 255  # of a file, on every file system in use
CONVERT_CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` at `offset` of `file`, or the first rows of it, if `further` tells where the others are."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    further: "TensorEntry | None" = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def rows(self, start: int, end: int) -> "TensorEntry":
        """Some rows of a matrix (or of what has a first axis), as a tensor of their own."""
        width = self.nbytes // self.shape[0]
        return replace(self, shape=(end - start, *self.shape[1:]), offset=self.offset + start * width, nbytes=(end - start) * width)

    def followed_by(self, further: "TensorEntry") -> "TensorEntry":
        """With the rows of another tensor of the same dtype behind its own."""
        shape = (self.shape[0] + further.shape[0], *self.shape[1:])
        return replace(self, shape=shape, nbytes=self.nbytes + further.nbytes, further=further)


def is_quantised(name: str, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether the tensor is a quantised weight or its scales, which stay in the dtypes in which they are stored."""
    if name.endswith(SCALE):
        return True
    return name.endswith("weight") and name.removesuffix("weight") + SCALE in entries


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Tensors of one safetensors file by name, without reading them.

    Raises CheckpointError if the file is missing, truncated or not in the safetensors format.
    """
    try:
        status = file.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
            raise CheckpointError(f"{file}: a folder, a pipe or a device, not a safetensors file. Give the file itself.")
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file}: not a safetensors file, or cut off inside its header ({size} bytes). "
                                      "Download it again; a Git LFS pointer or a web page saved in its place looks like this.")
            header = json.loads(stream.read(header_bytes))
    except FileNotFoundError:
        raise CheckpointError(f"{file}: the file is missing. Download it from the repository of the other files.") from None
    except OSError as error:
        raise CheckpointError(f"{file}: can't be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
        raise CheckpointError(f"{file}: the safetensors header is damaged ({error}). Download the file again.") from error

    entries: dict[str, TensorEntry] = {}
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the safetensors header is damaged (no table of tensors). Download the file again.")
    header.pop("__metadata__", None)
    for name, info in header.items():
        entry = _parse_entry(file, name, info, data_start=8 + header_bytes)
        if entry.offset + entry.nbytes > size:
            raise CheckpointError(f"{file}: cut off at {size} bytes; {name} ends at byte {entry.offset + entry.nbytes}. "
                                  "The download was interrupted: download the file again.")
        entries[name] = entry
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a file that `read_header` has accepted."""
    with path.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    metadata = header.get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: the metadata in its header are no strings. The file was written by a broken tool.")
    return metadata


def _parse_entry(file: Path, name: str, info: object, *, data_start: int) -> TensorEntry:
    try:
        dtype = DTYPES[info["dtype"]]
        shape = tuple(_whole(size) for size in info["shape"])
        begin, end = (_whole(offset) for offset in info["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: the header entry of {name!r} is damaged ({error!r}). Download it again.") from error
    nbytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or begin < 0 or end - begin != nbytes:
        raise CheckpointError(f"{file}: {name} has shape {shape} of {dtype} but {end - begin} bytes. Download the file again.")
    return TensorEntry(name, file, dtype, shape, data_start + begin, nbytes)


def _whole(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no whole number")
    return value


def open_shards(folder: Path, stem: str, variants: Sequence[str] = ("",)) -> dict[str, TensorEntry]:
    """All tensors of `{stem}[.variant].safetensors` or of the shards that its index lists, by name.

    Args:
        variants: tried in order, "" is the plain name. Index files are named as by transformers and by diffusers.
    Raises: CheckpointError if nothing is found, a shard is missing, or an index and its shards disagree.
    """
    tried = []
    for variant in variants:
        dotted = f".{variant}" if variant else ""
        single = folder / f"{stem}{dotted}.safetensors"
        indices = [folder / f"{stem}{dotted}.safetensors.index.json", folder / f"{stem}.safetensors.index{dotted}.json"]
        for index in indices:
            if index.is_file():
                return _read_index(index)
        if single.is_file():
            return read_header(single)
        tried.append(single.name)
    raise CheckpointError(f"{folder}: holds none of {', '.join(tried)}, nor an index of shards with such a name. "
                          "Pickled .bin weights are not read; convert them to safetensors.")


def _read_index(index: Path) -> dict[str, TensorEntry]:
    files = read_table(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(shard, str) for shard in files.values()):
        raise CheckpointError(f"{index}: not an index of shards: it has no weight_map of tensors and files. Download it again.")
    for shard in sorted(set(files.values())):
        if shard != Path(shard).name or shard in ("", ".", "..") or "\\" in shard or ":" in shard:
            raise CheckpointError(f"{index}: names the shard {shard!r} outside of its own folder. Don't use this checkpoint.")
        if len(shard.encode(errors="replace")) > MAX_NAME_BYTES:
            raise CheckpointError(f"{index}: names the shard {shard!r:.60}..., which no file can be called. Download it again.")
    absent = sorted(shard for shard in set(files.values()) if not (index.parent / shard).is_file())
    if absent:
        raise CheckpointError(f"{index.parent}: {len(absent)} of {len(set(files.values()))} shards are missing: "
                              f"{', '.join(absent)}. Download them from the repository of the other files.")
    headers = {shard: read_header(index.parent / shard) for shard in sorted(set(files.values()))}
    lost = sorted(name for name, shard in files.items() if name not in headers[shard])
    if lost:
        raise CheckpointError(f"{index}: {len(lost)} tensors are not in the shard that the index names, first {lost[0]} in "
                              f"{files[lost[0]]}. Index and shards come from different downloads: download all of them again.")
    return {name: headers[shard][name] for name, shard in files.items()}


def map_tensor(entry: TensorEntry) -> torch.Tensor:
    """The tensor as a private, copy-on-write mapping of its file: pages are read when touched and never written back."""
    if entry.nbytes == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.further is not None:  # no mapping any more, but in memory
        own = entry.shape[0] - entry.further.shape[0]
        return torch.cat((map_tensor(replace(entry, further=None).rows(0, own)), map_tensor(entry.further)))
    start = entry.offset - entry.offset % mmap.ALLOCATIONGRANULARITY
    with entry.file.open("rb") as stream:
        buffer = mmap.mmap(stream.fileno(), entry.offset + entry.nbytes - start, offset=start, access=mmap.ACCESS_COPY)
    raw = torch.frombuffer(buffer, dtype=torch.uint8, offset=entry.offset - start, count=entry.nbytes)
    if entry.offset % entry.dtype.itemsize:  # an old writer: views need aligned storage
        raw = raw.clone()
    return raw.view(entry.dtype).view(entry.shape)


def read_tensor(entry: TensorEntry, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> torch.Tensor:
    """The tensor in `dtype` (None: as stored) on `device`; mapped without a copy where nothing has to change."""
    mapped = map_tensor(entry)
    dtype = dtype or entry.dtype
    device = torch.device(device)
    if dtype == entry.dtype and device.type == "cpu":
        return mapped
    out = torch.empty(entry.shape, dtype=dtype, device=device)
    flat_in, flat_out = mapped.view(-1), out.view(-1)
    chunk = CONVERT_CHUNK_BYTES // entry.dtype.itemsize
    for start in range(0, entry.numel, chunk):  # in pieces: no second copy of a large matrix in either dtype
        flat_out[start : start + chunk].copy_(flat_in[start : start + chunk])
    return out
