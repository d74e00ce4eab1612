"""Writes checkpoints that differ from another one in some tensors: those are written, everything else is hard-linked.

A file that is linked has two names and one content. Nothing in this package ever writes into an existing weights file, and
nothing else should: replace such files, don't edit them.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OutputError
from .shards import DTYPES, TensorEntry, open_shards, read_tensor

MAX_SHARD_BYTES = 5 * 10**9
COPY_CHUNK_BYTES = 16 * 2**20
INDEX = "model.safetensors.index.json"
PLAIN = "model.safetensors"  # other readers prefer it to an index, so no output has one
DECODER_FOLDER = "diffusion-decoder"
DECODER_STEM = "diffusion_pytorch_model"  # diffusers' name of weights
DECODER_VARIANTS = ("bf16", "")  # in the order in which readers prefer them
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when its turn to be written comes, so that only one is in memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def stored(cls, entry: TensorEntry) -> "Deferred":
        """As it lies in its file."""
        return cls(entry.shape, entry.dtype, lambda: read_tensor(entry))

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


Tensors = Mapping[str, Tensor | Deferred]
OnWrite = Callable[[str, int, int], None]
"""Called with the name of a file, the bytes of tensors written to it and those to write."""


def write_safetensors(
    path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None, on_write: OnWrite | None = None
) -> None:
    """Writes tensor after tensor, in their dtypes; the bytes are on the disk when it returns. Raises OSError (disk full)."""
    # as the format's own writer: widest dtypes first, which keeps every tensor aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with path.open("xb") as stream:  # x: never into a file that is there, which may be a link to somebody's weights
        stream.write(len(encoded).to_bytes(8, "little") + encoded)
        done = 0
        for name in names:
            given = tensors[name]
            tensor = given.make() if isinstance(given, Deferred) else given
            assert tuple(tensor.shape) == tuple(given.shape) and tensor.dtype == given.dtype, name
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            stream.write(memoryview(flat.view(torch.uint8).numpy()))
            done += flat.nbytes
            if on_write is not None:
                on_write(path.name, done, end)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def whole_folder(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """`with whole_folder(output) as temporary`: what is put into `temporary` becomes `output` at the end, and only then.

    Args:
        overwrite: replace a folder that is there; else only an empty one is.
    Raises: OutputError if `output` is there and not to be replaced, or can't be written; it is then as before.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file. Give the name of a folder to make.")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise OutputError(f"{output} exists and is not empty. Give another name, or --overwrite to replace it.")
    temporary, old = (output.with_name(f".blip3o-{uuid.uuid4().hex[:12]}.{kind}") for kind in ("tmp", "old"))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync_folder(temporary)
        if output.exists():
            os.replace(output, old)
        try:
            os.replace(temporary, output)
        except OSError:
            if old.exists():
                os.replace(old, output)
            raise
        _sync_folder(output.parent)
    except OSError as error:
        raise OutputError(f"{output}: can't be written ({error.strerror or error}). Nothing was left there.") from error
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def save_derived(
    source: Path, output: Path, tensors: Tensors, entries: Mapping[str, TensorEntry], *, decoder: Path | None = None,
    decoder_tensors: Mapping[str, Tensors] | None = None, config_changes: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False, max_shard_bytes: int = MAX_SHARD_BYTES, on_write: OnWrite | None = None,
) -> None:  # fmt: skip
    """Writes `output`, a complete checkpoint that is `source` with other values for some tensors.

    Args:
        source: checkpoint folder of the published layout; stays as it is.
        tensors: name as in the files -> new value, in the dtype to write; names that `entries` lacks are added.
        entries: all tensors of the source, as from `open_shards`; those not in `tensors` stay in their shards, which are linked.
        decoder: folder of the diffusion decoder, which becomes diffusion-decoder/; None takes that of the source, if it is there.
        decoder_tensors: "unet" or "vae" -> new values of some or all of its tensors; the part is then written whole.
        config_changes: JSON file in the output ("config.json", "diffusion-decoder/vae/config.json") -> keys to set; None takes a key out.
        overwrite: replace an existing checkpoint. A folder without config.json is never replaced.
    Raises: OutputError if `output` can't be made; nothing is left of it then. CheckpointError if decoder weights are unreadable.
    """
    source, output = Path(source).resolve(), Path(os.path.abspath(output))
    decoder = decoder or (source / DECODER_FOLDER if (source / DECODER_FOLDER).is_dir() else None)
    if output.resolve() == source or source in output.resolve().parents:
        raise OutputError(f"{output} is, or lies in, the checkpoint it is made from. Give another place.")
    if overwrite and output.is_dir() and any(output.iterdir()) and not (output / "config.json").is_file():
        raise OutputError(f"{output} holds files but no checkpoint, so it is not replaced. Give another name.")
    if decoder_tensors and decoder is None:
        raise OutputError(f"{source} has no {DECODER_FOLDER}/ to take configuration and scheduler from. Name one.")
    kept = {name: entry for name, entry in entries.items() if name not in tensors}
    with whole_folder(output, overwrite=overwrite) as folder:
        weight_files = {entry.file.name for entry in entries.values()} | {INDEX, PLAIN}
        link_tree(source, folder, {source / name for name in (*weight_files, DECODER_FOLDER)})
        weight_map = _link_shards(kept, folder)
        weight_map |= _write_shards(tensors, folder, max_shard_bytes, "model-updated" if entries else "model", on_write)
        total = sum(entry.nbytes for entry in kept.values()) + sum(tensor.nbytes for tensor in tensors.values())
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
        if decoder is not None:
            _save_decoder(decoder, folder / DECODER_FOLDER, decoder_tensors or {})
        for name, changes in (config_changes or {}).items():
            config = json.loads((folder / name).read_text("utf-8")) if (folder / name).exists() else {}
            (folder / name).unlink(missing_ok=True)  # a link: writing into it would change the source
            taken_out = {key for key, value in changes.items() if value is None}
            _write_json(folder / name, {key: value for key, value in {**config, **changes}.items() if key not in taken_out})


def _link_shards(kept: Mapping[str, TensorEntry], folder: Path) -> dict[str, str]:
    """Links every shard that still holds something; -> name of the tensor: name of its shard."""
    names: dict[Path, str] = {}
    for file in sorted({entry.file for entry in kept.values()}):
        name = "model-base.safetensors" if file.name == PLAIN else file.name
        number = 1
        while (folder / name).exists():  # entries of several folders, or a file that no index lists
            number += 1
            name = f"{file.stem}-{number}.safetensors"
        names[file] = name
        _link(file, folder / name)
    return {tensor: names[entry.file] for tensor, entry in kept.items()}


def _write_shards(tensors: Tensors, folder: Path, max_shard_bytes: int, stem: str, on_write: OnWrite | None) -> dict[str, str]:
    """Writes shards of at most `max_shard_bytes` (or of one larger tensor); -> name of the tensor: name of its shard."""
    shards: list[dict[str, Tensor | Deferred]] = []
    filled = 0
    for name, tensor in tensors.items():
        if not shards or filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    # old shards may hold former values of these tensors; readers that don't go by the index take the last file's, so sort behind
    first, number = stem, 1
    while any(folder.glob(f"{stem}-*.safetensors")):
        number += 1
        stem = f"{first}{number}"
    weight_map = {}
    for index, shard in enumerate(shards, start=1):
        file = f"{stem}-{index:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, {"format": "pt"}, on_write)
        weight_map |= dict.fromkeys(shard, file)
    return weight_map


def _save_decoder(decoder: Path, target: Path, tensors: Mapping[str, Tensors]) -> None:
    """Links `decoder`; parts in `tensors` get one new weights file in place of all that were there."""
    replaced = {path for part in tensors for path in (decoder / part).iterdir() if path.name.startswith(DECODER_STEM)}
    link_tree(decoder, target, replaced)
    for part, new in tensors.items():
        old = open_shards(decoder / part, DECODER_STEM, DECODER_VARIANTS)
        unknown = sorted(new.keys() - old.keys())
        assert not unknown, f"{part} has no tensor {unknown[0]}"
        kept = {name: Deferred.stored(entry) for name, entry in old.items() if name not in new}
        write_safetensors(target / part / f"{DECODER_STEM}.safetensors", {**kept, **new}, {"format": "pt"})


def link_tree(source: Path, target: Path, skipped: set[Path]) -> None:
    """Links all files below `source`; hidden ones (caches of downloads, .git) are left out."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path in skipped or path.name.startswith("."):
            continue
        if path.is_dir():
            link_tree(path, target / path.name, skipped)
        else:
            _link(path, target / path.name)
    _sync_folder(target)


def _link(file: Path, target: Path) -> None:
    """A second name for `file`, or a copy where the file system can't do that."""
    try:
        os.link(file.resolve(), target)  # resolved: in a download cache the name is itself a link
    except FileExistsError:
        raise
    except OSError:
        with file.open("rb") as original, target.open("xb") as copy:
            shutil.copyfileobj(original, copy, COPY_CHUNK_BYTES)
            copy.flush()
            os.fsync(copy.fileno())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with path.open("xb") as stream:
        stream.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the names in `folder` last; a system that can't sync folders (Windows) keeps them anyway."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
