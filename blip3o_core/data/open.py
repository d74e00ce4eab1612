"""From a path, as a user names it, to its dataset."""

import os
from pathlib import Path
from typing import Protocol

from ..errors import DataError
from .conversations import ConversationsDataset
from .edits import EditsDataset
from .folder import FolderDataset
from .jsonl import PICTURE_FIELDS, JsonlDataset
from .records import Records
from .sample import PICTURE_TASKS, TASKS, WRITING_TASKS, Sample
from .webdataset import WebDataset, find_shards

METADATA = "metadata.jsonl"
FITTING_TASKS = {
    "folder": ("text_to_image", "contrast", *PICTURE_TASKS),
    "jsonl": ("text_to_image", "contrast", *PICTURE_TASKS, *WRITING_TASKS),
    "conversations": (*WRITING_TASKS, "text_to_image"),
    "edits": ("edit",),
    "webdataset": TASKS,
}


class IndexedDataset(Protocol):
    """Samples that can be read in any order."""

    name: str
    task: str

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Sample:
        """Decodes no picture. Raises BrokenSample."""
        ...


StreamDataset = WebDataset
"""Samples that are read one after the other: `name`, `task`, `count`, `stream(pass_number, lane, lanes)`."""


def open_dataset(
    path: str, *, format: str, task: str, images: str = "", samples: int = 0, shuffle_buffer: int = 1000, seed: int = 0
) -> IndexedDataset | StreamDataset:
    """Opens a dataset of TASKS; the arguments are those of [[data]].

    Raises: DataError if it is missing, empty, not in the layout of `format`, or does not fit the task.
    """
    if task not in TASKS:
        raise DataError(f"{path}: the task {task!r} is unknown. Use one of {', '.join(TASKS)}.")
    if format not in ("auto", *FITTING_TASKS):
        raise DataError(f"{path}: the format {format!r} is unknown. Use auto or one of {', '.join(FITTING_TASKS)}.")
    path = os.path.expanduser(path)
    format = _guess_format(path) if format == "auto" else format
    if task not in FITTING_TASKS[format]:
        fitting = [name for name, tasks in FITTING_TASKS.items() if task in tasks]
        raise DataError(f"{path}: the format {format} holds nothing for the task {task}, but for {', '.join(FITTING_TASKS[format])}. "
                        f"{task} is learned from {' or '.join(fitting)}.")
    if format == "webdataset":
        return WebDataset(path, task, samples=samples, shuffle_buffer=shuffle_buffer, seed=seed)
    file = Path(path)
    if not file.exists():
        raise DataError(f"{path}: there is no such file or folder. Check the path.")
    if format == "folder":
        if not file.is_dir():
            raise DataError(f"{path}: a file, not a folder of pictures. Set data.format to what it is, or leave it out.")
        return FolderDataset(file, task)
    if file.is_dir():
        file = file / METADATA
        if not file.is_file():
            raise DataError(f"{path}: a folder without {METADATA}. Give the file.")
    root = Path(os.path.expanduser(images)) if images else file.parent
    if not root.is_dir():
        raise DataError(f"{images}: there is no such folder, from which the names in {path} start. Check data.images.")
    if format == "edits":
        return EditsDataset(file, task, root)
    if format == "conversations" or task in WRITING_TASKS:
        return ConversationsDataset(file, task, root)
    return JsonlDataset(file, task, root)


def _guess_format(path: str) -> str:
    file = Path(path)
    if file.is_dir():
        return "jsonl" if (file / METADATA).is_file() else "folder"
    if path.endswith(".tar") or not file.exists():
        find_shards(path)  # raises for what is missing, and for addresses
        return "webdataset"
    if file.suffix.lower() not in (".json", ".jsonl"):
        raise DataError(f"{path}: neither a folder nor a .json, .jsonl or .tar. Set data.format to what it is.")
    first = Records(file).first
    if "instruction" in first:
        return "edits"
    if "conversations" in first or "messages" in first:
        return "conversations"
    if file.suffix.lower() == ".jsonl" or any(name in first for name in PICTURE_FIELDS):
        return "jsonl"
    raise DataError(f"{path}: the first record has the fields {', '.join(first) or '(none)'}, which neither name an instruction (edits), "
                    "nor conversations, nor a file_name. Set data.format to what it is.")
