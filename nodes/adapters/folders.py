"""Where checkpoints lie: the `blip3o` model folder, its listing, and picked name -> path."""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import folder_paths

from ...blip3o_core.errors import CheckpointError
from ...blip3o_core.variants.blip3o import NANO_FOLDER
from ...blip3o_core.variants.sana_decoder import is_sana_decoder
from ...blip3o_core.variants.sdxl_decoder import find_sdxl_decoder

FOLDER_TYPE = "blip3o"
CLIP_VISION = "clip_vision/"  # marks single files among the names of vision encoders
TEXT_ENCODERS = "text_encoders/"  # and among those of Qwen2.5-VL
MAX_DEPTH = 2  # models/blip3o/NAME, or models/blip3o/OWNER/NAME as a hub download lays it out


def register_folders() -> None:
    """Adds models/blip3o to what extra_model_paths.yaml may have put there already."""
    paths, _ = folder_paths.folder_names_and_paths.get(FOLDER_TYPE, ([], set()))
    own = str(Path(folder_paths.models_dir) / FOLDER_TYPE)
    merged = [*paths, *([] if own in paths else [own])]
    folder_paths.folder_names_and_paths[FOLDER_TYPE] = (merged, {".safetensors"})


def list_checkpoints() -> list[str]:
    """Folders of a model with a config.json, relative to their root, sorted."""
    return sorted(name for name, path in _candidates() if is_checkpoint(path))


def list_sdxl_decoders() -> list[str]:
    """Folders that are a decoder or hold one as `diffusion-decoder/`, sorted; the inner folder is not listed again."""
    found = {name: decoder for name, path in _candidates() if (decoder := find_sdxl_decoder(path)) is not None}
    return sorted(name for name, decoder in found.items() if found.get(PurePosixPath(name).parent.as_posix()) != decoder)


def list_sana_decoders() -> list[str]:
    """Folders whose config.json is that of a SigLIP2 + SANA decoder, sorted."""
    return sorted(name for name, path in _candidates() if is_sana_decoder(path))


def list_vision_encoders() -> list[str]:
    """Folders that may hold an EVA-CLIP tower (a checkpoint, or the repository of the tower) or a SANA decoder with its SigLIP2, and
    files in clip_vision, sorted."""
    found = [name for name, path in _candidates() if any(path.glob("*.safetensors")) or (path / "pytorch_model.bin").is_file()]
    return sorted(found) + [CLIP_VISION + name for name in folder_paths.get_filename_list("clip_vision")]


def list_qwen() -> list[str]:
    """Folders of Qwen2.5-VL-Instruct, which a split takes its backbone from, and files in text_encoders that are called so."""
    found = sorted(name for name, path in _candidates() if _is_qwen(path))
    files = folder_paths.get_filename_list("text_encoders")
    return found + [TEXT_ENCODERS + name for name in files if "qwen" in name.lower() and name.endswith(".safetensors")]


def list_loras() -> list[str]:
    """Files in models/loras that may be a LoRA of ours."""
    return [name for name in folder_paths.get_filename_list("loras") if name.endswith(".safetensors")]


def is_offered(name: str | None, names: list[str], folder: str = f"models/{FOLDER_TYPE}") -> bool | str:
    """For validate_inputs: True, or why a name can't be opened and what to do, which the host's own check of a list doesn't say.

    None stands for an input that is linked: its value is not known yet.
    """
    if name is None or name in names:
        return True
    instead = f", or pick what is there: {', '.join(names[:8])}" if names else ""
    return f"{name!r} is not in {folder}. Put it there and press R to refresh the list{instead}."


def resolve_lora(name: str) -> Path:
    """The file of a picked LoRA. Raises CheckpointError for a name that the listing doesn't have."""
    if name not in list_loras():
        raise CheckpointError(f"{name!r} is not in models/loras (any more). Press R to refresh the list.")
    return Path(folder_paths.get_full_path_or_raise("loras", name))


def resolve_vision_encoder(name: str) -> Path:
    """The folder or file of a picked vision encoder. Raises CheckpointError for a name that the listing doesn't have."""
    return _resolve_folder_or_file(name, CLIP_VISION, list_vision_encoders)


def resolve_qwen(name: str) -> Path:
    """The folder or file of a picked Qwen2.5-VL. Raises CheckpointError for a name that the listing doesn't have."""
    return _resolve_folder_or_file(name, TEXT_ENCODERS, list_qwen)


def _resolve_folder_or_file(name: str, mark: str, listing: Callable[[], list[str]]) -> Path:
    """mark: what names of files begin with, the host's folder of them and a slash."""
    if not str(name).startswith(mark):  # str: a graph over HTTP may say null
        return resolve(name)
    folder = mark.rstrip("/")
    if name not in listing():
        raise CheckpointError(f"{name!r} is not in models/{folder} (any more). Press R to refresh the list.")
    return Path(folder_paths.get_full_path_or_raise(folder, name.removeprefix(mark)))


def resolve(name: str) -> Path:
    """The folder of a picked name. Raises CheckpointError for a name that the listing doesn't have."""
    for candidate, path in _candidates():
        if candidate == name:
            return path
    raise CheckpointError(f"{name!r} is not in models/{FOLDER_TYPE} (any more). Put the checkpoint folder there and press R "
                          "to refresh the list.")


def is_checkpoint(path: Path) -> bool:
    """Whether the folder is a transformers checkpoint, not a SANA decoder nor the EVA-CLIP tower, whose config.json has no model type."""
    config = path / "config.json"
    return not is_sana_decoder(path) and config.is_file() and '"model_type"' in config.read_text("utf-8", errors="replace")


def _is_qwen(path: Path) -> bool:
    config = path / "config.json"
    return config.is_file() and re.search(r'"model_type"\s*:\s*"qwen2_5_vl"', config.read_text("utf-8", errors="replace")) is not None


def fingerprint(folder: Path) -> str:
    """Changes when a weight or configuration file in `folder` (or the file itself) or its decoder is replaced.

    16 hex digits, for the host writes it into every picture.
    """
    depths = ("", "*/", "*/*/")  # the root, its decoder, the parts of the decoder
    files = [folder] if folder.is_file() else sorted(
        path for depth in depths for kind in ("bin", "safetensors", "json") for path in folder.glob(f"{depth}*.{kind}"))  # fmt: skip
    told = ";".join(f"{path.relative_to(folder.parent)}:{path.stat().st_mtime_ns}:{path.stat().st_size}" for path in files)
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _candidates() -> list[tuple[str, Path]]:
    """(name with forward slashes, folder) of every folder down to MAX_DEPTH; earlier roots win."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER_TYPE)):
        level = [root] if root.is_dir() else []
        for _ in range(MAX_DEPTH):
            level = [child for parent in level for child in _folders_in(parent)]
            for child in level:
                found.setdefault(child.relative_to(root).as_posix(), child)
    found.setdefault("nano", NANO_FOLDER)  # in this package, so that everything runs before anything is downloaded
    return list(found.items())


def _folders_in(parent: Path) -> list[Path]:
    """Without hidden ones. One that may not be read is empty, so that it takes no other from the lists."""
    try:
        return [child for child in parent.iterdir() if child.is_dir() and child.name[:1] != "."]
    except OSError:
        return []
