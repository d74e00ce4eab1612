"""Tars in the layout of the webdataset library, streamed: {key}.jpg beside {key}.txt, {key}.json or {key}.labels.png.

Only local files are opened, and by this module: webdataset itself would run `pipe:` commands and download.
"""

import glob
import json
import logging
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..runtime import require_package
from .broken import BrokenSample
from .conversations import conversation_sample
from .records import field
from .sample import PICTURE_TASKS, WRITING_TASKS, Sample
from .seeds import BUFFER, SHARDS, generator

log = logging.getLogger(__name__)

PICTURES = ("jpg", "jpeg", "png", "webp")
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # pipe:, https:, s3:; a Windows drive has one letter
_META = re.compile(r"__[^/]*__($|/)")  # members that webdataset skips
_DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, ValueError)
_BLOCK = 512
_LABELS = "labels.png"  # beside a picture to be drawn, if there is a map of it


class WebDataset:
    """Samples of several tars, in another order in each pass."""

    def __init__(self, path: str, task: str, *, samples: int, shuffle_buffer: int, seed: int) -> None:
        """Raises DataError if there is no such tar or no sample in them, InputError without the package webdataset."""
        self.name = path
        self.task = task
        require_package("webdataset", extra="train", purpose="reading tars")
        self._shards = find_shards(path)
        self._buffer = shuffle_buffer
        self._seed = seed
        self.count = samples or self._counted()
        """Number of samples, broken ones included."""

    def _counted(self) -> int:
        log.info("%s: counting the samples of %d tars; data.samples = NUMBER saves that", self.name, len(self._shards))
        count = sum(map(count_samples, self._shards))
        if not count:
            raise DataError(f"{self.name}: no samples in {len(self._shards)} tars. Members are called KEY.jpg, KEY.txt, KEY.json.")
        log.info("%s: %d samples", self.name, count)
        return count

    def stream(self, pass_number: int, lane: int, lanes: int) -> Iterator[Sample | BrokenSample]:
        """This lane's part of one pass; all lanes together see every sample once.

        Each lane takes equally many whole shards. The rest of the division (all, if there are fewer shards than lanes) is read by
        every lane, which keeps every lanes-th sample, so that no lane runs ahead of the others by a shard per pass.
        """
        order = generator(SHARDS, self._seed, pass_number).permutation(len(self._shards))
        whole = len(order) - len(order) % lanes
        items = chain(self._items(order[lane:whole:lanes]), islice(self._items(order[whole:]), lane, None, lanes))
        yield from shuffled(items, self._buffer, generator(BUFFER, self._seed, pass_number, lane))

    def _items(self, order: Iterable[int]) -> Iterator[Sample | BrokenSample]:
        tariterators = require_package("webdataset", extra="train", purpose="reading tars").tariterators
        for number in order:
            shard = self._shards[number]
            problems: list[str] = []

            def report(error: Exception, problems: list[str] = problems) -> bool:
                problems.append(str(error.args[0]) if error.args else type(error).__name__)
                return True  # go on with the next member

            for members in tariterators.group_by_keys(_members(shard, problems), handler=report):
                suffixes = "+".join(suffix for suffix in members if not suffix.startswith("__"))  # tells apart pieces of one key
                try:
                    item = read_sample(f"{shard}: {members['__key__']}.{suffixes}", self.task, members)
                except BrokenSample as broken:
                    item = broken
                yield item
            for problem in problems:
                yield BrokenSample(shard, problem)


def _members(shard: str, problems: list[str]) -> Iterator[dict[str, Any]]:
    """File name and bytes of each whole member; what ends the tar early is added to `problems`."""
    tariterators = require_package("webdataset", extra="train", purpose="reading tars").tariterators
    try:
        with open(shard, "rb") as stream:
            for member in tariterators.tar_file_iterator(stream):
                yield {**member, "__url__": shard}
            if _cut_between_members(stream):
                problems.append("the tar ends without its end mark: it is cut off")
    except _DAMAGED as error:
        reason = str(error).split(" @ <")[0]  # webdataset adds the stream's repr
        problems.append(f"the tar is damaged or cut off ({reason or type(error).__name__})")


def _cut_between_members(stream: Any) -> bool:
    """A tar ends with blocks of zeros; Python's reader does not mind if they, or what was before them, are missing."""
    size = os.fstat(stream.fileno()).st_size
    stream.seek(0)
    if stream.read(3)[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7"):
        return False  # compressed; a cut is an error of the decompressor
    stream.seek(max(0, size - _BLOCK))
    return stream.read() != bytes(_BLOCK)


def read_sample(name: str, task: str, members: dict[str, Any]) -> Sample:
    """One sample from the bytes of its members, by suffix. Raises BrokenSample if one is missing or can't be understood."""
    if task == "edit":
        return Sample(name, task, text=_text(name, members, "instruction"), images=(_picture(name, members, "source."),),
                      target=_picture(name, members, "target."), labels=members.get(_LABELS))
    if task == "segment":
        return Sample(name, task, images=(_picture(name, members),), target=_picture(name, members, "labels."))
    if task in WRITING_TASKS:
        record = _json(name, members)
        pictures = [suffix for suffix in PICTURES if suffix in members]
        if task == "text" or not pictures:
            return conversation_sample(name, task, record, ())
        return conversation_sample(name, task, record, (_picture(name, members),))
    picture = _picture(name, members)
    text = "" if task in PICTURE_TASKS else _text(name, members, "text", "caption")
    return Sample(name, task, text=text, images=(picture,) if task == "reconstruct" else (), target=picture, labels=members.get(_LABELS))


def _picture(name: str, members: dict[str, Any], prefix: str = "") -> bytes:
    found = [prefix + suffix for suffix in PICTURES if prefix + suffix in members]
    if len(found) != 1:
        raise BrokenSample(name, f"has {len(found) or 'no'} pictures called .{prefix}({'|'.join(PICTURES)})")
    return members[found[0]]


def _text(name: str, members: dict[str, Any], *fields: str) -> str:
    try:
        text = members["txt"].decode("utf-8-sig") if "txt" in members else field(_json(name, members), *fields)
    except UnicodeDecodeError as error:
        raise BrokenSample(name, f"its .txt is not UTF-8 ({error.reason} at byte {error.start})") from error
    if not isinstance(text, str) or not text.strip():
        raise BrokenSample(name, f"its text ({' or '.join(fields)}) is {text!r}")
    return text.strip()


def _json(name: str, members: dict[str, Any]) -> dict[str, Any]:
    if "json" not in members:
        raise BrokenSample(name, "has neither .txt nor .json" if "txt" not in members else "has no .json")
    try:
        record = json.loads(members["json"].decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BrokenSample(name, f"its .json is no valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise BrokenSample(name, f"its .json is a {type(record).__name__}, not an object {{...}}")
    return record


def shuffled(items: Iterable[Any], size: int, random: np.random.Generator) -> Iterator[Any]:
    """The items in an order that depends on their number only: each is drawn from the `size` that were read and not yet drawn."""
    waiting: list[Any] = []
    for item in items:
        if len(waiting) < size:
            waiting.append(item)
            continue
        place = int(random.integers(size))
        waiting[place], item = item, waiting[place]
        yield item
    for place in random.permutation(len(waiting)):
        yield waiting[place]


def _without_braces(path: str) -> list[str]:
    """shards/{000..002}.tar -> the three names."""
    braceexpand = require_package("braceexpand", extra="train", purpose="a {...} pattern").braceexpand
    try:
        return list(braceexpand(path))
    except ValueError as error:
        raise DataError(f"{path}: its braces don't match ({error}). Write for instance shards/{{000..012}}.tar.") from error


def find_shards(path: str) -> list[str]:
    """The local files that a path, a glob or a {000..012} pattern names. Raises DataError if one is missing."""
    if _ADDRESS.match(path):
        raise DataError(f"{path}: only local tars are read, no addresses and no pipe: commands. Download them first.")
    if Path(path).is_file():
        return [path]
    if Path(path).is_dir():
        path = os.path.join(glob.escape(path), "*.tar")
    patterns = _without_braces(path) if "{" in path else [path]
    shards = []
    for pattern in patterns:
        found = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern, recursive=True))
        found = [shard for shard in found if Path(shard).is_file()]
        if not found:
            raise DataError(f"{pattern}: there is no such file or folder. Check the path.")
        shards += found
    return list(dict.fromkeys(shards))


def count_samples(shard: str) -> int:
    """Keys in a tar, from the headers of its members; of a damaged one as far as they can be read."""
    split = require_package("webdataset", extra="train", purpose="reading tars").tariterators.base_plus_ext
    count, last = 0, None
    try:
        with tarfile.open(shard, "r:*") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # else every header stays in memory
                if not member.isreg() or _META.match(member.name):
                    continue
                key, _ = split(member.name)
                if key is not None and key != last:
                    count, last = count + 1, key
    except _DAMAGED as error:
        log.warning("%s: %d samples, then damaged or cut off (%s)", shard, count, error)
    return count
