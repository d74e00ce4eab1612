"""Between a complete folder and ComfyUI's model folders, in which what other nodes can use as well is one file.

models/text_encoders/NAME_qwen2.5_vl.safetensors   the language model and its eyes, as Qwen2.5-VL-Instruct is stored in one file
models/clip_vision/NAME_eva_clip.safetensors       the EVA-CLIP tower, if the checkpoint holds it
models/blip3o/NAME/                                queries and diffusion transformer (`split`), tokenizer, decoder
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint.save import Deferred, OnWrite, Tensors, save_derived, write_safetensors
from ..checkpoint.shards import TensorEntry, read_tensor
from ..errors import CheckpointError, InputError, OutputError
from ..files import remove_stale_files, require_writable, whole_file
from . import split
from .blip3o import SKIPPED, Blip3oCheckpoint, published_name
from .eva_clip import SETTINGS, EvaClipCheckpoint

QWEN_ROWS = {2048: 151_936, 3584: 152_064}
"""Width -> rows of the embedding matrix of Qwen2.5-VL-Instruct 3B and 7B. They are more than it has tokens, and other readers want all."""


def write_comfyui(
    checkpoint: Blip3oCheckpoint, models: Path, name: str, *, decoder: Path | None = None, overwrite: bool = False,
    on_write: OnWrite | None = None,
) -> list[Path]:  # fmt: skip
    """Writes the parts of a complete checkpoint; returns where they are.

    Args:
        models: ComfyUI's folder of models, which must exist.
        decoder: folder of the SDXL decoder, which goes with the queries by hard links; None for none.
    Raises: InputError for a split, a quantised model or an unusable name; OutputError if a place is taken or can't be written;
        CheckpointError if there is no vision tower.
    """
    if checkpoint.qwen is not None:
        raise InputError(f"{checkpoint.folder}: a split has these parts already. Put it into models/blip3o, the file of its language model "
                         "into models/text_encoders.")
    split.require_original_precision(checkpoint.folder, checkpoint.components)
    if not checkpoint.components["vision_tower"]:
        raise CheckpointError(f"{checkpoint.folder}: the shards hold no vision tower (visual.*), without which Qwen2.5-VL is not complete. "
                              "Download the complete BLIP3-o repository.")
    if not models.is_dir():
        raise OutputError(f"{models}: there is no such folder. Give ComfyUI's folder of models.")
    if not re.fullmatch(r"\w[\w .+-]*", name) or name != name.rstrip(". "):
        raise InputError(f"{name!r} is no name for files and folders: letters, digits, spaces and . _ + - only. Give another with --name.")
    tower = checkpoint.components["vision_encoder"]
    text_encoder = models / "text_encoders" / f"{name}_qwen2.5_vl.safetensors"
    clip_vision = models / "clip_vision" / f"{name}_eva_clip.safetensors"
    folder = models / "blip3o" / name
    wanted = [text_encoder, *([clip_vision] if tower else []), folder]
    if folder.resolve() == checkpoint.folder.resolve():
        raise InputError(f"{folder} is the model itself. Give the parts another name with --name.")
    taken = [place for place in wanted if place.exists()]
    if taken and not overwrite:
        raise OutputError(f"{taken[0]} exists. Give another name with --name, or --overwrite to replace what is there.")
    parents = [place.parent for place in wanted]
    require_writable(parents, models)
    remove_stale_files(parents)  # gigabytes, if a conversion was killed
    with whole_file(text_encoder) as temporary:
        write_safetensors(temporary, _qwen_tensors(checkpoint), {"format": "pt"}, _told_as(text_encoder, on_write))
    if tower:
        settings = checkpoint.vision_encoder_source().config.untold
        metadata = {"format": "pt", **({SETTINGS: json.dumps(settings)} if settings else {})}
        tensors = {key: Deferred.stored(entry) for key, entry in tower.items()}
        with whole_file(clip_vision) as temporary:
            write_safetensors(temporary, tensors, metadata, _told_as(clip_vision, on_write))
    split.write_split(checkpoint.folder, checkpoint.config, checkpoint.components, folder, decoder=decoder,
                      rows_from=checkpoint.tokenizer.image_start_id, overwrite=overwrite, on_write=on_write)  # fmt: skip
    return wanted


def write_folder(
    checkpoint: Blip3oCheckpoint, output: Path, *, vision_encoder: EvaClipCheckpoint | None = None, decoder: Path | None = None,
    overwrite: bool = False, on_write: OnWrite | None = None,
) -> None:  # fmt: skip
    """Writes a complete checkpoint, in the published layout, of a split with the language model that it was opened with.

    Args:
        vision_encoder: a tower to put into the shards, where published models have theirs.
        decoder: folder that becomes diffusion-decoder/; None takes that of the split, if there is one.
    Raises: InputError if `checkpoint` is complete already; OutputError if `output` is there or can't be written.
    """
    if checkpoint.qwen is None:
        raise InputError(f"{checkpoint.folder} is a complete folder already. --output puts a split and its Qwen2.5-VL together again.")
    tensors: dict[str, Tensor | Deferred] = {
        published_name(component, name): Deferred.stored(entry)
        for component, entries in checkpoint.components.items() if component != SKIPPED for name, entry in entries.items()
    }  # fmt: skip
    changes = {split.KEY: None}
    if vision_encoder is not None:
        tower = vision_encoder.load(dtype=None)  # mapped, not read
        tensors |= {published_name("vision_encoder", name): value for name, value in tower.state_dict().items()}
        changes["gen_vision_config"] = vision_encoder.config.untold or None
    save_derived(checkpoint.folder, output, tensors, {}, decoder=decoder, config_changes={"config.json": changes}, overwrite=overwrite,
                 on_write=on_write)  # fmt: skip


def _qwen_tensors(checkpoint: Blip3oCheckpoint) -> Tensors:
    """Of Qwen2.5-VL-Instruct: without the rows of BLIP3-o's own tokens, with as many as the original has, zeros where nothing was kept."""
    own = checkpoint.tokenizer.image_start_id
    rows = max(QWEN_ROWS.get(checkpoint.text_config.hidden_size, own), own)

    def original(entry: TensorEntry) -> Deferred:
        def make() -> Tensor:
            kept = read_tensor(entry.rows(0, own))
            return torch.cat((kept, kept.new_zeros(rows - own, *entry.shape[1:])))

        return Deferred((rows, *entry.shape[1:]), entry.dtype, make)

    tensors = {}
    for component in split.BORROWED:
        for name, entry in checkpoint.components[component].items():
            by_token = (component, name) in (("language_model", split.EMBEDDING), ("output_head", split.HEAD))
            tensors[published_name(component, name)] = original(entry) if by_token else Deferred.stored(entry)
    return tensors


def _told_as(path: Path, on_write: OnWrite | None) -> OnWrite | None:
    """Tells the name that a file will have, not its temporary one."""
    return None if on_write is None else lambda _, done, total: on_write(path.name, done, total)
