"""The EVA-CLIP tower as published: a pickle in a repository of its own, and the same tensors inside BLIP3-o's root shards."""

import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.json_files import read_table
from ..checkpoint.load import OnLoad, expected_shapes, fill, place
from ..checkpoint.report import require_matching
from ..checkpoint.shards import TensorEntry, open_shards, read_header, read_metadata
from ..errors import CheckpointError
from ..models.eva_clip import EvaClip, EvaClipConfig

log = logging.getLogger(__name__)

COMPONENT = "EVA-CLIP tower"
REPOSITORY = "jiuhai/eva_clip_vision_tower"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
NESTED_UNDER = ("model", "module", "state_dict")
REMAP_BYTES = 2**30  # torch maps a pickle as one piece: mapped anew after so many bytes, its pages never add up
PREFIXES = ("module.", "visual.")  # stripped in this order
SETTINGS = "blip3o.eva_clip"
"""In the metadata of a single file: what a config.json beside it would say, as JSON."""


@dataclass(frozen=True)
class EvaClipCheckpoint:
    """An opened tower: configuration, names and shapes are read and checked, no tensor is kept."""

    source: Path
    config: EvaClipConfig
    entries: dict[str, TensorEntry]  # name in the module -> tensor; offsets are meaningless if it lies in a pickle
    pickle_file: Path | None = None

    @classmethod
    def open(cls, path: str | Path) -> "EvaClipCheckpoint":
        """Opens the folder of the EVA repository, or its file: safetensors (preferred) or the published pytorch_model.bin.

        SETTINGS in the header of a single file, or else a config.json beside the weights, override what is read off the tensors. The
        pickle may hold more tensors, which are ignored as in the reference; a safetensors file may not.
        Raises CheckpointError if there is no such tower here, a pickle holds anything but data, or shapes don't fit.
        """
        path = Path(os.path.expanduser(path))
        file, found = _find_weights(path)
        overrides = _read_overrides(file.parent / "config.json")
        if file.suffix not in PICKLE_SUFFIXES:
            names = _tower_names(found, file)
            if file.is_file():  # and no name for the shards of an index
                overrides = {**overrides, **_stored_settings(file)}
            return cls.from_entries({name: found[original] for name, original in names.items()}, file, overrides=overrides)
        entries = {name: TensorEntry(original, file, tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
                   for name, (original, tensor) in _read_pickle(file).items()}
        config = EvaClipConfig.from_shapes({name: entry.shape for name, entry in entries.items()}, overrides, file)
        wanted = expected_shapes(_empty(config))
        ignored = sorted(entries.keys() - wanted.keys())
        if ignored:
            log.info("%s: ignored %d tensors that are no part of the tower, first %s", file, len(ignored), ignored[0])
        entries = {name: entry for name, entry in entries.items() if name in wanted}
        require_matching(COMPONENT, file, wanted, entries)
        return cls(file, config, entries, pickle_file=file)

    @classmethod
    def from_entries(
        cls, entries: Mapping[str, TensorEntry], source: Path, *, overrides: Mapping[str, Any] | None = None
    ) -> "EvaClipCheckpoint":
        """The tower of a root checkpoint: `entries` is its component "vision_encoder", names without prefix.

        `overrides` are fields as in the tower's config.json; without them heads have the published width, 112.
        Raises CheckpointError if the tower is not in the checkpoint or its shapes don't fit.
        """
        if not entries:
            raise CheckpointError(f"{source}: holds no EVA-CLIP tower. Download {REPOSITORY} and give its folder.")
        config = EvaClipConfig.from_shapes({name: entry.shape for name, entry in entries.items()}, overrides or {}, source)
        require_matching(COMPONENT, source, expected_shapes(_empty(config)), entries)
        return cls(source, config, dict(entries))

    def load(
        self, *, dtype: torch.dtype | None, device: torch.device | str = "cpu", on_load: OnLoad | None = None, stream: bool = False
    ) -> EvaClip:
        """The tower in `dtype` (None: as stored) on `device`, frozen and in eval mode. A pickle can't be streamed and is loaded whole.

        Tensors are mapped, and converted one by one where needed.
        """
        model = _empty(self.config)
        if self.pickle_file is None:
            fill(model, self.entries, component=COMPONENT, source=self.source, dtype=dtype, device=device, on_load=on_load,
                 stream=stream)  # fmt: skip
        else:
            self._fill_from_pickle(model, dtype=dtype, device=device, on_load=on_load)
        model.dtype = dtype
        return model.eval()

    def _fill_from_pickle(
        self, model: EvaClip, *, dtype: torch.dtype | None, device: torch.device | str, on_load: OnLoad | None
    ) -> None:
        tensors: dict[str, tuple[str, Tensor]] = {}
        mapped = zipfile.is_zipfile(self.pickle_file)  # older formats are read as a whole
        total, done, remap_at = sum(entry.nbytes for entry in self.entries.values()), 0, 0
        for name, entry in self.entries.items():
            if done >= remap_at:
                tensors = _read_pickle(self.pickle_file)  # a new mapping; the old one goes with its pages
                remap_at = done + REMAP_BYTES if mapped else total
            original, tensor = tensors.pop(name, (entry.name, None))
            if tensor is None or tuple(tensor.shape) != entry.shape:
                raise CheckpointError(f"{self.source}: {original} has changed since the file was opened. Open it again.")
            place(model, name, entry, tensor.detach().to(device=device, dtype=dtype).contiguous())
            done += entry.nbytes
            if on_load is not None:
                on_load(COMPONENT, done, total)


def _empty(config: EvaClipConfig) -> EvaClip:
    with torch.device("meta"):
        return EvaClip(config)


def _find_weights(path: Path) -> tuple[Path, dict[str, TensorEntry]]:
    """The file (of shards: their folder's index) and, unless it is a pickle, its tensors."""
    if path.is_file():
        if path.suffix in PICKLE_SUFFIXES:
            return path, {}
        if path.suffix == ".safetensors":
            return path, read_header(path)
        raise CheckpointError(f"{path}: not a file of weights. Give {PICKLE_NAME}, a .safetensors file, or their folder.")
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such file or folder. Download {REPOSITORY} and give its folder.")
    if (path / "model.safetensors").is_file() or (path / "model.safetensors.index.json").is_file():
        return path / "model.safetensors", open_shards(path, "model")
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others[0], read_header(others[0])
    if (path / PICKLE_NAME).is_file():
        return path / PICKLE_NAME, {}
    several = f"{len(others)} safetensors files; give the right one itself" if others else "neither"
    raise CheckpointError(f"{path}: an EVA-CLIP folder holds {PICKLE_NAME} or one safetensors file, this one {several}. "
                          f"Download {REPOSITORY}.")


def _read_overrides(path: Path) -> Mapping[str, Any]:
    return read_table(path) if path.is_file() else {}


def _stored_settings(file: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads(read_metadata(file).get(SETTINGS, "{}"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{file}: {SETTINGS} in its header is no table of settings. Convert the model again: blip3o convert.")
    return settings


def _tower_names(names: Iterable[str], source: Path) -> dict[str, str]:
    """Name in the module -> name in the file. Raises CheckpointError if two become the same without their prefixes."""
    table: dict[str, str] = {}
    for original in names:
        name = original
        for prefix in PREFIXES:
            name = name.removeprefix(prefix)
        if name in table:
            raise CheckpointError(f"{source}: holds both {table[name]} and {original}; two towers in one file can't be told apart.")
        table[name] = original
    return table


def _read_pickle(file: Path) -> dict[str, tuple[str, Tensor]]:
    """Name in the module -> (name in the file, tensor), mapped from the file where its format allows it (torch >= 1.6)."""
    try:
        with file.open("rb") as stream:
            beginning = stream.read(4)
        if not beginning.startswith((b"PK\x03\x04", b"\x80")):
            raise CheckpointError(f"{file}: not a PyTorch file ({file.stat().st_size} bytes). Download it again; a Git LFS pointer "
                                  "or a web page saved in its place looks like this.")
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=beginning.startswith(b"PK"))
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{file}: refused, because the pickle holds more than data or is damaged ({_reason(error)}). Nothing "
                              f"in it was run. Download {REPOSITORY} again, or use safetensors.") from error
    except MemoryError:
        raise
    except Exception as error:  # of damaged bytes torch's reader makes anything: struct.error, KeyError, IndexError, ...
        raise CheckpointError(f"{file}: damaged or cut off ({_reason(error)}). Download it again.") from error
    for key in NESTED_UNDER:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{file}: holds a {type(state).__name__}, not a table of tensors. Download {REPOSITORY}.")
    tensors = {name: value for name, value in state.items()
               if isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided}
    return {name: (original, tensors[original]) for name, original in _tower_names(tensors, file).items()}


def _reason(error: BaseException) -> str:
    """The line of torch's long messages that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith(("WeightsUnpickler error", "Unsupported"))]
    return (telling or lines or [type(error).__name__])[0][:200]
