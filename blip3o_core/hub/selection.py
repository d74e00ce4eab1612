"""Which files of a repository are read: a pure function of its listing, and of the index of shards where there is one."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import DownloadError
from ..variants.blip3o import KEY_TABLE, SKIPPED
from ..variants.blip3o import TASKS as PARTS_OF
from ..variants.eva_clip import PICKLE_NAME
from ..variants.sana_decoder import SUBMODELS
from ..variants.sdxl_decoder import FOLDER_NAME, VARIANTS, WEIGHTS
from .repositories import TASKS

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja")  # configuration and tokenizer
LEGAL = ("README", "LICENSE", "LICENCE", "NOTICE")
LEFTOVERS = ("trainer_", "training_", "optimizer", "pytorch_model")  # of a training run, or of pickled copies
SANA_PARTS = ("encoder", "transformer", "vae", "scheduler")
ALWAYS = PARTS_OF["text to image"]  # without these no task opens the folder


@dataclass(frozen=True)
class Selection:
    """Names of files, and what the folder's INDEX shall list, which is not among them; None where there is no index."""

    files: frozenset[str]
    weight_map: dict[str, str] | None = None


def select(
    kind: str, names: Collection[str], tasks: Sequence[str], weight_map: Mapping[str, str] | None, *, also: Collection[str] = ()
) -> Selection:
    """Args:
        kind: of a Repository.
        tasks: of TASKS; only kind "blip3o" makes a difference between them.
        weight_map: of the repository's INDEX, if it has one.
        also: further components that are wanted.
    Raises: DownloadError if the repository lacks what every use needs, or has names that leave the folder.
    """
    if kind == "blip3o":
        chosen = _blip3o(names, tasks, weight_map, components_for(tasks).union(also))
    else:
        chosen = {"eva_clip": _eva_clip, "sana": _sana}[kind](names, weight_map)
    legal = {name for name in names if "/" not in name and name.startswith(LEGAL)}
    selection = Selection(frozenset(chosen.files | legal), chosen.weight_map)
    for name in selection.files:
        _require_inside(name)
    absent = selection.files - set(names)
    if absent:
        raise DownloadError(f"the index of shards names files that the repository doesn't have: {', '.join(sorted(absent))}. "
                            "It is being changed, or the mirror is incomplete: try again later, or without HF_ENDPOINT.")
    return selection


def parse_weight_map(text: bytes) -> dict[str, str]:
    """Tensor -> shard of an index. Raises DownloadError if it is none."""
    try:
        return {str(name): str(shard) for name, shard in json.loads(text)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DownloadError(f"{INDEX} of the repository is no index of shards ({error!r}). Try again, or without HF_ENDPOINT.") from error


def component(tensor: str) -> str | None:
    """Of `variants.blip3o.KEY_TABLE`; None for a tensor that no BLIP3-o model has."""
    return next((name for prefix, name, _ in KEY_TABLE if tensor.startswith(prefix)), None)


def whole_components(weight_map: Mapping[str, str], local: Mapping[str, str]) -> frozenset[str]:
    """Components that an index in the folder holds entirely: an earlier download was for them."""
    lost = {component(tensor) for tensor in weight_map if tensor not in local}
    return frozenset(name for tensor in local if (name := component(tensor)) is not None and name not in lost)


def components_for(tasks: Sequence[str]) -> frozenset[str]:
    """Components of the root shards."""
    return frozenset(ALWAYS).union(*(PARTS_OF[TASKS[task]] for task in tasks))


def _blip3o(
    names: Collection[str], tasks: Sequence[str], weight_map: Mapping[str, str] | None, wanted: Collection[str]
) -> Selection:  # fmt: skip
    root = {name for name in names if "/" not in name and name.endswith(TEXT_SUFFIXES) and not name.startswith(LEFTOVERS)} - {INDEX}
    _require(names, "config.json")
    decoder = _sdxl_decoder(names) if set(tasks) - {"ask"} else set()
    if weight_map is None:
        _require(names, SINGLE)
        return Selection(frozenset(root | decoder | {SINGLE}))
    kept = {tensor: shard for tensor, shard in weight_map.items() if _is_kept(component(tensor), wanted)}
    return Selection(frozenset(root | decoder | set(kept.values())), kept)


def _is_kept(name: str | None, wanted: Collection[str]) -> bool:
    return name is None or (name != SKIPPED and name in wanted)  # an unknown tensor is for the checkpoint's reader to refuse


def _sdxl_decoder(names: Collection[str]) -> set[str]:
    """Configurations, and of each network the weights that `SdxlDecoderCheckpoint.open` prefers."""
    chosen = {f"{FOLDER_NAME}/unet/config.json", f"{FOLDER_NAME}/vae/config.json", f"{FOLDER_NAME}/scheduler/scheduler_config.json"}
    for name in chosen:
        _require(names, name)
    for part in ("unet", "vae"):
        stem = f"{FOLDER_NAME}/{part}/{WEIGHTS}"
        copies = {variant: {name for name in names if name.startswith(stem) and _variant(name[len(stem) :]) == variant}
                  for variant in VARIANTS}  # fmt: skip
        found = next((own for own in copies.values() if own), None)
        if found is None:
            raise DownloadError(f"{stem}: the repository holds no safetensors of it. Pickled weights are not read.")
        chosen |= found
    return chosen | {name for name in names if name == f"{FOLDER_NAME}/model_index.json"}


def _variant(rest: str) -> str | None:
    """What is behind the stem of a safetensors file or its index -> "bf16", "" and the like; None for other files."""
    match = re.fullmatch(r"(?:\.(\w+))?(?:-\d+-of-\d+)?(?:\.(\w+))?\.safetensors(?:\.index(?:\.(\w+))?\.json)?", rest)
    return None if match is None else next((group for group in match.groups() if group), "")


def _eva_clip(names: Collection[str], _: Mapping[str, str] | None) -> Selection:
    weights = {name for name in names if "/" not in name and name.endswith((".safetensors", ".safetensors.index.json"))}
    if not weights:
        _require(names, PICKLE_NAME)
        weights = {PICKLE_NAME}
    return Selection(frozenset(weights | ({"config.json"} & set(names))))


def _sana(names: Collection[str], weight_map: Mapping[str, str] | None) -> Selection:
    _require(names, "config.json")
    wanted = {"config.json", SUBMODELS, *(f"{part}/{file}" for part in SANA_PARTS for file in ("config.json", "scheduler_config.json"))}
    if weight_map is None:
        _require(names, SINGLE)
        return Selection(frozenset({SINGLE} | (wanted & set(names))))
    return Selection(frozenset(set(weight_map.values()) | (wanted & set(names))), dict(weight_map))


def _require(names: Collection[str], name: str) -> None:
    if name not in names:
        raise DownloadError(f"{name} is not in the repository. It is being changed, or the mirror is incomplete: try again later, or "
                            "without HF_ENDPOINT.")


def _require_inside(name: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or any(letter in name for letter in "\\:\0"):
        raise DownloadError(f"the repository names a file {name!r} outside of its own folder. Don't use it.")
