"""Where checkpoints lie: the `blip3o` model folder, its listing, and picked name -> path."""

from pathlib import Path, PurePosixPath

import folder_paths

from ...blip3o_core.errors import CheckpointError
from ...blip3o_core.variants.sdxl_decoder import find_sdxl_decoder

FOLDER_TYPE = "blip3o"
MAX_DEPTH = 2  # models/blip3o/NAME, or models/blip3o/OWNER/NAME as a hub download lays it out


def register_folders() -> None:
    """Adds models/blip3o to what extra_model_paths.yaml may have put there already."""
    paths, _ = folder_paths.folder_names_and_paths.get(FOLDER_TYPE, ([], set()))
    own = str(Path(folder_paths.models_dir) / FOLDER_TYPE)
    merged = [*paths, *([] if own in paths else [own])]
    folder_paths.folder_names_and_paths[FOLDER_TYPE] = (merged, {".safetensors"})


def list_checkpoints() -> list[str]:
    """Folders with a config.json, relative to their root, sorted."""
    return sorted(name for name, path in _candidates() if (path / "config.json").is_file())


def list_sdxl_decoders() -> list[str]:
    """Folders that are a decoder or hold one as `diffusion-decoder/`, sorted; the inner folder is not listed again."""
    found = {name: decoder for name, path in _candidates() if (decoder := find_sdxl_decoder(path)) is not None}
    return sorted(name for name, decoder in found.items() if found.get(PurePosixPath(name).parent.as_posix()) != decoder)


def resolve(name: str) -> Path:
    """The folder of a picked name. Raises CheckpointError for a name that the listing doesn't have."""
    for candidate, path in _candidates():
        if candidate == name:
            return path
    raise CheckpointError(f"{name!r} is not in models/{FOLDER_TYPE} (any more). Put the checkpoint folder there and press R "
                          "to refresh the list.")


def fingerprint(folder: Path) -> str:
    """Changes when a weight or configuration file in `folder` or its decoder is replaced."""
    files = sorted(path for pattern in ("*.safetensors", "*.json", "*/*/*.safetensors", "*/*.safetensors", "*/*/*.json", "*/*.json")
                   for path in folder.glob(pattern))  # fmt: skip
    return ";".join(f"{path.relative_to(folder)}:{path.stat().st_mtime_ns}:{path.stat().st_size}" for path in files)


def _candidates() -> list[tuple[str, Path]]:
    """(name with forward slashes, folder) of every folder down to MAX_DEPTH; earlier roots win."""
    found: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER_TYPE)):
        level = [root] if root.is_dir() else []
        for _ in range(MAX_DEPTH):
            level = [child for parent in level for child in parent.iterdir() if child.is_dir() and child.name[:1] != "."]
            for child in level:
                found.setdefault(child.relative_to(root).as_posix(), child)
    return list(found.items())
