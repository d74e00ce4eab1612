"""Prompt files of public benchmarks, and pictures in the layout that their scorers read.

Formats as of the public repositories: GenEval (djghosh13/geneval: evaluation_metadata.jsonl; NNNNN/metadata.jsonl and
NNNNN/samples/NNNNN.png), DPG-Bench (ELLA: a folder of .txt; one .png per prompt that holds its pictures as a grid), WISE (a JSON list
with prompt_id and Prompt; ID.png).
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import InputError
from ..files import require_writable, whole_file, write_text


@dataclass(frozen=True)
class FilePrompt:
    """One prompt and what its scorer knows it by."""

    name: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A benchmark: how prompts are read, and how the pictures of one prompt are written."""

    read: Callable[[Path], list[FilePrompt]]
    write: Callable[[Path, FilePrompt, Sequence[Image.Image]], None]
    is_written: Callable[[Path, FilePrompt, int], bool]
    images_per_prompt: int


def read_geneval(file: Path) -> list[FilePrompt]:
    """evaluation_metadata.jsonl: one object with a `prompt` per line. Raises InputError."""
    prompts = []
    for number, line in enumerate(_text(file).splitlines()):
        if line.strip():
            record = _json(line, f"{file}, line {number + 1}")
            prompts.append(FilePrompt(f"{len(prompts):05d}", _prompt(record, "prompt", f"{file}, line {number + 1}"), record))
    return _some(prompts, file)


def read_dpg_bench(folder: Path) -> list[FilePrompt]:
    """A folder of NAME.txt, each one prompt. Raises InputError."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder. DPG-Bench's prompts are a folder of .txt files.")
    return _some([FilePrompt(file.stem, _text(file).strip()) for file in sorted(folder.glob("*.txt"))], folder)


def read_wise(file: Path) -> list[FilePrompt]:
    """A JSON list of objects with `prompt_id` and `Prompt`. Raises InputError."""
    records = _json(_text(file), str(file))
    if not isinstance(records, list):
        raise InputError(f"{file}: not a JSON list. Give one of WISE's data files.")
    prompts = []
    for index, record in enumerate(records):
        where = f"{file}, entry {index + 1}"
        text = _prompt(record, "Prompt", where)
        name = str(record.get("prompt_id", index + 1))
        if not name.isalnum():
            raise InputError(f"{where}: prompt_id {name!r} is no number or word.")
        prompts.append(FilePrompt(name, text, record))
    return _some(prompts, file)


def write_geneval(folder: Path, prompt: FilePrompt, pictures: Sequence[Image.Image]) -> None:
    own = folder / prompt.name
    require_writable([own / "samples"], own)
    for number, picture in enumerate(pictures):
        _save(picture, own / "samples" / f"{number:05d}.png")
    write_text(own / "metadata.jsonl", json.dumps(prompt.metadata, ensure_ascii=False))


def write_dpg_bench(folder: Path, prompt: FilePrompt, pictures: Sequence[Image.Image]) -> None:
    """All pictures in one file, row by row; two by two if there are four."""
    columns = math.ceil(math.sqrt(len(pictures)))
    width, height = pictures[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for number, picture in enumerate(pictures):
        grid.paste(picture, (number % columns * width, number // columns * height))
    _save(grid, folder / f"{prompt.name}.png")


def write_wise(folder: Path, prompt: FilePrompt, pictures: Sequence[Image.Image]) -> None:
    """The scorer looks at one picture per prompt."""
    _save(pictures[0], folder / f"{prompt.name}.png")


FORMATS = {
    "geneval": Format(read_geneval, write_geneval,
                      lambda folder, prompt, count: (folder / prompt.name / "metadata.jsonl").is_file()
                      and (folder / prompt.name / "samples" / f"{count - 1:05d}.png").is_file(), 4),
    "dpg-bench": Format(read_dpg_bench, write_dpg_bench, lambda folder, prompt, count: (folder / f"{prompt.name}.png").is_file(), 4),
    "wise": Format(read_wise, write_wise, lambda folder, prompt, count: (folder / f"{prompt.name}.png").is_file(), 1),
}  # fmt: skip


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: can't be read as UTF-8 text ({error}). Give the prompt file of the benchmark.") from error


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: no valid JSON ({error}). Give the prompt file of the benchmark.") from error


def _prompt(record: Any, key: str, where: str) -> str:
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: has no text {key!r}. Give the prompt file of the benchmark.")
    return text.strip()


def _some(prompts: list[FilePrompt], source: Path) -> list[FilePrompt]:
    if not prompts:
        raise InputError(f"{source}: holds no prompts. Give the prompt file of the benchmark.")
    return prompts


def _save(picture: Image.Image, path: Path) -> None:
    with whole_file(path) as temporary:
        picture.save(temporary, format="PNG")
