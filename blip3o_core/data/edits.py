"""Edits: records of {"source": file or files, "instruction": text, "target": file}."""

from pathlib import Path

from ..errors import DataError
from .broken import BrokenSample
from .records import Records, existing
from .sample import Sample

FIELDS = ("source", "instruction", "target")


class EditsDataset:
    """Pictures before and after, and what was to be changed."""

    def __init__(self, file: Path, task: str, root: Path) -> None:
        """Raises DataError if the first record lacks a field."""
        self.name = str(file)
        self.task = task
        self._root = root
        self._records = Records(file)
        missing = [name for name in FIELDS if name not in self._records.first]
        if missing:
            raise DataError(f"{file}: the first record has the fields {', '.join(self._records.first) or '(none)'}. An edit also needs "
                            f"{', '.join(missing)}.")

    def __len__(self) -> int:
        return len(self._records)

    def sample(self, index: int) -> Sample:
        name, record = self._records.name(index), self._records.read(index)
        sources, instruction = record.get("source"), record.get("instruction")
        sources = sources if isinstance(sources, list) else [sources]
        if not sources:
            raise BrokenSample(name, "has no source picture")
        if not isinstance(instruction, str) or not instruction.strip():
            raise BrokenSample(name, f"its instruction is {instruction!r}, not a text")
        return Sample(name, self.task, text=instruction.strip(), images=tuple(existing(self._root, file, name) for file in sources),
                      target=existing(self._root, record.get("target"), name))
