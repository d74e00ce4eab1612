"""Records of a JSON list or of JSON lines, found by their place in the file and parsed one at a time.

27 million lines are 325 MB of places, and no file stays open: a dataset can be sent to worker processes as it is.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from .broken import BrokenSample

_CHUNK_BYTES = 1 << 24
_SPACE = re.compile(r"[ \t\n\r]*")
_BOM = b"\xef\xbb\xbf"


class Records:
    """`len(records)`, and `records.read(index)` for one of them."""

    def __init__(self, file: Path) -> None:
        """Raises DataError if the file is missing, empty, or (a list) not JSON; of lines only the first is parsed."""
        self.file = file
        try:
            with file.open("rb") as stream:
                start = stream.read(len(_BOM) + 64)
            start = start.removeprefix(_BOM).lstrip()
            self._starts, self._lengths = _list_places(file) if start.startswith(b"[") else _line_places(file)
        except OSError as error:
            raise DataError(f"{file}: can't be read ({error.strerror or error}). Check the path and its permissions.") from error
        if not len(self):
            raise DataError(f"{file}: holds no records. Give a JSON list, or one JSON object per line.")
        try:
            self.first = self.read(0)
        except BrokenSample as error:
            raise DataError(f"{error}. Give a JSON list, or one JSON object per line.") from error

    def __len__(self) -> int:
        return len(self._starts)

    def name(self, index: int) -> str:
        return f"{self.file}, record {index + 1}"

    def read(self, index: int) -> dict[str, Any]:
        """Raises BrokenSample with the line, if it is no JSON object."""
        with self.file.open("rb") as stream:
            stream.seek(int(self._starts[index]))
            return self._parse(index, stream.read(int(self._lengths[index])))

    def all(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(index, record) of those that can be read."""
        with self.file.open("rb") as stream:
            for index in range(len(self)):
                stream.seek(int(self._starts[index]))
                try:
                    yield index, self._parse(index, stream.read(int(self._lengths[index])))
                except BrokenSample:
                    continue  # reported when it is drawn

    def _parse(self, index: int, content: bytes) -> dict[str, Any]:
        try:
            record = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise BrokenSample(self.name(index), f"line {self._line(index)} is no valid JSON ({message})") from error
        if not isinstance(record, dict):
            raise BrokenSample(self.name(index), f"line {self._line(index)} is a {type(record).__name__}, not an object {{...}}")
        return record

    def _line(self, index: int) -> int:
        lines, offset = 1, int(self._starts[index])
        with self.file.open("rb") as stream:
            while offset > 0 and (chunk := stream.read(min(offset, _CHUNK_BYTES))):
                lines += chunk.count(b"\n")
                offset -= len(chunk)
        return lines


def _line_places(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """(starts uint64, lengths uint32) of the lines that are not empty."""
    ends, done = [], 0
    with file.open("rb") as stream:
        first = len(_BOM) if stream.read(len(_BOM)) == _BOM else 0
        stream.seek(0)
        while chunk := stream.read(_CHUNK_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")).astype(np.uint64) + np.uint64(done + 1))
            done += len(chunk)
    bounds = np.concatenate([np.array([first], np.uint64), *ends, np.array([done], np.uint64)])
    lengths = np.diff(bounds)
    whole = lengths > 2  # an empty line is \n or \r\n
    return bounds[:-1][whole], lengths[whole].astype(np.uint32)


def _list_places(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same for the elements of a list, which is parsed once from end to end."""
    try:
        raw = file.read_bytes()
        text = raw.removeprefix(_BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: is not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error
    decoder = json.JSONDecoder()
    starts, lengths = [], []
    place = _SPACE.match(text, 0).end() + 1  # behind the bracket
    place_bytes = len(raw) - len(raw.removeprefix(_BOM)) + len(text[:place].encode())
    try:
        while True:
            begin = _SPACE.match(text, place).end()
            if text[begin : begin + 1] == "]" and not starts:
                end = begin
            else:
                _, end = decoder.raw_decode(text, begin)
                length = len(text[begin:end].encode())
                starts.append(place_bytes + begin - place)  # white space is ASCII
                lengths.append(length)
                place_bytes = starts[-1] + length
            place = _SPACE.match(text, end).end()
            place_bytes += place - end
            if text[place : place + 1] == "]":
                break
            if text[place : place + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
            place, place_bytes = place + 1, place_bytes + 1
        if tail := text[place + 1 :].strip():
            raise json.JSONDecodeError(f"{tail[:20]!r} after the list", text, place + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        where = f"line {error.lineno}, column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else "nested too deep"
        raise DataError(f"{file}: is no valid JSON ({where}). Mend that place, or write one JSON object per line.") from error
    return np.array(starts, np.uint64), np.array(lengths, np.uint32)


def field(record: dict[str, Any], *names: str) -> Any:
    """The first of the named fields that is there, else None."""
    return next((record[name] for name in names if record.get(name) is not None), None)


def inside(root: Path, name: str, where: str) -> Path:
    """`name` as a path that starts from `root`. Raises DataError if it leaves that folder (links are not followed)."""
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, name))
    if not path.startswith(os.path.join(base, "")):
        raise DataError(f"{where}: {name!r} lies outside of {root}. Names start from there; data.images gives another folder.")
    return Path(path)


def existing(root: Path, name: Any, where: str) -> Path:
    """The same for a picture that must be there. Raises BrokenSample if it is not."""
    if not isinstance(name, str) or not name:
        raise BrokenSample(where, f"the name of the picture is {name!r}, not a text")
    path = inside(root, name, where)
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name with a NUL, or longer than the file system knows
        found = False
    if not found:
        raise BrokenSample(where, f"there is no file {path}")
    return path
