"""metadata.jsonl as in Hugging Face's imagefolder: one {"file_name": ..., "text": ...} per line."""

from pathlib import Path
from typing import Any

from ..errors import DataError
from .broken import BrokenSample
from .records import Records, existing, field, inside
from .sample import PICTURE_TASKS, Sample

PICTURE_FIELDS = ("file_name", "image", "image_path")
CAPTION_FIELDS = ("text", "caption", "prompt")
CHECKED_RECORDS = 1_000_000  # up to here all names are compared; more would take minutes and gigabytes


class JsonlDataset:
    """Pictures and captions by record."""

    def __init__(self, file: Path, task: str, root: Path) -> None:
        """Raises DataError if the first record lacks a field that the task needs, or a picture is named twice."""
        self.name = str(file)
        self.task = task
        self._root = root
        self._records = Records(file)
        first = self._records.first
        needed = [("picture", PICTURE_FIELDS)] + ([] if task in PICTURE_TASKS else [("caption", CAPTION_FIELDS)])
        for what, names in needed:
            if not any(name in first for name in names):
                raise DataError(f"{file}: the first record has the fields {', '.join(first) or '(none)'}, none of which names the "
                                f"{what}. The task {task} needs one of {', '.join(names)}.")
        if len(self._records) <= CHECKED_RECORDS:
            self._require_unique_names()

    def _require_unique_names(self) -> None:
        seen: dict[Any, int] = {}
        for index, record in self._records.all():
            name = field(record, *PICTURE_FIELDS)
            if not isinstance(name, str):
                continue
            inside(self._root, name, self._records.name(index))
            if name in seen:
                raise DataError(f"{self.name}: {name!r} is named in record {seen[name] + 1} and again in record {index + 1}. Remove one "
                                "of them; data.repeats shows all pictures more often.")
            seen[name] = index

    def __len__(self) -> int:
        return len(self._records)

    def sample(self, index: int) -> Sample:
        name, record = self._records.name(index), self._records.read(index)
        path = existing(self._root, field(record, *PICTURE_FIELDS), name)
        text = ""
        if self.task not in PICTURE_TASKS:
            text = field(record, *CAPTION_FIELDS)
            if not isinstance(text, str) or not text.strip():
                raise BrokenSample(name, f"its caption is {text!r}, not a text")
        return Sample(name, self.task, text=text.strip(), images=(path,) if self.task == "reconstruct" else (), target=path)
