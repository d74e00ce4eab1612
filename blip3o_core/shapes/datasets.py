"""Training data from the world, in the formats that the trainer reads: tars for pictures, JSON lines for text.

Sample i of a task depends on the seed, the task and i only. A shard is written whole or not at all; an interrupted run goes on where
it was.
"""

import concurrent.futures
import io
import json
import multiprocessing
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..errors import DataError, InputError
from ..files import require_writable, whole_file, write_text
from ..presets import PRESETS
from . import edits, prompts, questions, texts
from .doodles import doodled_picture
from .facts import USUAL, random_scene, tidied
from .holdout import is_held_out, is_undrawn
from .language import caption, complete_caption, detailed_caption
from .world import BACKGROUNDS, Scene, label_map, pick, render

SHARD_SAMPLES = 1000
DESCRIPTION = "shapes.json"
"""What the data was made with; another seed or number in the same folder is refused."""
VERSION = 9  # of what the generator makes from a seed; raise it whenever a sample changes

Members = dict[str, bytes]  # suffix -> content
TEXT_TASK = "text"
_OBJECTS = (1, 1, 1, 2, 2, 3, 3, 4)  # in scenes that texts tell of: what a word means is learned from pictures of few objects
_QUESTION_WEIGHTS = {"shape": 2.0, "where": 2.0, "list": 1.5, "background": 0.5}  # kind of question -> how often, next to the others


def write_datasets(folder: Path, *, seed: int, counts: Mapping[str, int], workers: int = 1) -> dict[str, Path]:
    """Writes so many samples for each task, without held-out combinations.

    Args:
        workers: processes that draw shards; the result doesn't depend on their number.
    Returns for each task what [[data]] names as path: a folder of tars, or for the task text a .jsonl.
    Raises: InputError for an unknown task, DataError if the folder holds other data, OutputError if it can't be written.
    """
    for task, count in counts.items():
        if task not in (*_MAKERS, TEXT_TASK) or count < 1:
            raise InputError(f"{task} = {count}: give at least one sample, of the tasks {', '.join((*_MAKERS, TEXT_TASK))}.")
    require_writable([folder], folder)
    _claim(folder, {"version": VERSION, "seed": seed, "shard_samples": SHARD_SAMPLES, "counts": dict(sorted(counts.items()))})
    paths: dict[str, Path] = {}
    missing: list[tuple[Path, str, int, int, int]] = []
    for task, count in counts.items():
        if task == TEXT_TASK:
            paths[task] = folder / "text.jsonl"
            if not paths[task].exists():
                lines = (json.dumps(_text_record(_generator(seed, task, index))) for index in range(count))
                write_text(paths[task], "\n".join(lines) + "\n")
        else:
            paths[task] = folder / task
            require_writable([paths[task]], paths[task])
            shards = [(_shard(paths[task], start), task, seed, start, min(start + SHARD_SAMPLES, count))
                      for start in range(0, count, SHARD_SAMPLES)]  # fmt: skip
            missing += [shard for shard in shards if not shard[0].exists()]
    _write_shards(missing, workers)
    return paths


def samples(task: str, seed: int, start: int, end: int) -> Iterator[Members]:
    """Members of a range of samples of one task with pictures."""
    for index in range(start, end):
        yield _MAKERS[task](_generator(seed, task, index))


def _generator(seed: int, task: str, index: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, index, *task.encode()]))


def _claim(folder: Path, description: dict[str, Any]) -> None:
    file = folder / DESCRIPTION
    text = json.dumps(description, indent=1) + "\n"
    try:
        found = file.read_text("utf-8")
    except FileNotFoundError:
        write_text(file, text)
        return
    if found != text:
        raise DataError(f"{file}: the folder holds other data ({' '.join(found.split())}), not {' '.join(text.split())}. "
                        "Give an empty folder, or delete this one.")


def _write_shards(missing: list[tuple[Path, str, int, int, int]], workers: int) -> None:
    with tqdm(total=len(missing), desc="drawing shapes", unit="shard", disable=len(missing) < 2) as bar:
        if workers == 1:
            for shard in missing:
                _write_shard(*shard)
                bar.update()
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
            for done in concurrent.futures.as_completed([pool.submit(_write_shard, *shard) for shard in missing]):
                done.result()
                bar.update()


def _write_shard(file: Path, task: str, seed: int, start: int, end: int) -> None:
    with whole_file(file) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
        for offset, members in enumerate(samples(task, seed, start, end)):
            for suffix, content in members.items():
                info = tarfile.TarInfo(f"{start + offset:08d}.{suffix}")  # no time, no owner: the same bytes each time
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _shard(folder: Path, start: int) -> Path:
    return folder / f"{start // SHARD_SAMPLES:05d}.tar"


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def described_scene(rng: np.random.Generator) -> tuple[Scene, str]:
    """For text-to-image and contrast: prompts of the six categories and mixed ones, and captions, most of which leave nothing open.

    What a caption leaves open, a model can't be wrong about, so it learns little from it.
    """
    kind = rng.random()
    if kind < 0.6:
        prompt = prompts.make_prompt(pick(rng, prompts.CATEGORIES), rng) if kind < 0.3 else prompts.mixed_prompt(rng)
        return prompts.scene_for(prompt, rng), prompt.text
    scene = random_scene(rng, objects=pick(rng, _OBJECTS), refuse=is_undrawn)
    tidy = tidied(scene)
    if rng.random() < USUAL and not is_undrawn(tidy):
        scene = tidy
    return scene, pick(rng, (*4 * (complete_caption,), detailed_caption, caption))(scene, rng)


def _captioned(rng: np.random.Generator) -> Members:
    scene, text = described_scene(rng)
    return {"png": png(render(scene)), "txt": text.encode()}


def _drawable(rng: np.random.Generator) -> Members:
    scene, text = described_scene(rng)
    return {"png": png(render(scene)), "txt": text.encode(), "labels.png": png(label_map(scene))}


def _picture(rng: np.random.Generator) -> Members:
    return {"png": png(render(random_scene(rng, refuse=is_held_out)))}


def _decodable(rng: np.random.Generator) -> Members:
    """Scenes and doodles; and a few empty pictures, which a DiT that leaves an object out asks for: never seen, they came out as noise."""
    kind = rng.random()
    if kind < 0.2:
        return {"png": png(doodled_picture(rng))}
    return {"png": png(render(Scene((), pick(rng, tuple(BACKGROUNDS)))))} if kind < 0.24 else _picture(rng)


def _edit(rng: np.random.Generator) -> Members:
    edit = edits.make_edit(str(rng.choice(edits.KINDS, p=list(edits.TRAINING_SHARES.values()))), rng)
    return {
        "json": json.dumps({"instruction": edit.instruction}).encode(), "source.png": png(render(edit.source)),
        "target.png": png(render(edit.target)), "labels.png": png(label_map(edit.target)),
    }  # fmt: skip


def _understand(rng: np.random.Generator) -> Members:
    """One to three questions about a picture in any order, sometimes with the wish to have it described.

    Few at once, because the loss is a mean over the words of a conversation's answers: among the many of a list, the one that names a
    shape or a place hardly counts.
    """
    scene = random_scene(rng, objects=pick(rng, _OBJECTS), refuse=is_held_out)
    if rng.random() < 0.1:
        return _conversation(scene, [_description(scene, rng)])
    asked = questions.questions(scene, rng)
    weights = np.array([_QUESTION_WEIGHTS.get(question.kind, 1.0) for question in asked])
    number = min(len(asked), pick(rng, (1, 1, 2, 3)))
    chosen = rng.choice(len(asked), number, replace=False, p=weights / weights.sum())
    return _conversation(scene, [(asked[index].text, asked[index].answer) for index in chosen.tolist()])


def _description(scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """A wish in few words or in those of a preset, and what fulfils it."""
    short, detailed = PRESETS["short_caption"].question, PRESETS["detailed_caption"].question
    request, describe = pick(rng, (
        *4 * [("Describe the picture.", caption)], *4 * [("Describe the picture in detail.", detailed_caption)],
        (short, caption), (detailed, detailed_caption),
    ))  # fmt: skip
    return request, describe(scene, rng)


def _segment(rng: np.random.Generator) -> Members:
    scene = random_scene(rng, refuse=is_held_out)
    return {"png": png(render(scene)), "labels.png": png(label_map(scene))}


def _conversation(scene: Scene, turns: list[tuple[str, str]]) -> Members:
    conversation = []
    for number, (text, answer) in enumerate(turns):
        conversation.append({"from": "human", "value": text if number else f"<image>\n{text}"})
        conversation.append({"from": "gpt", "value": answer})
    return {"json": json.dumps({"conversations": conversation}).encode(), "png": png(render(scene))}


def _text_record(rng: np.random.Generator) -> dict[str, str]:
    task = texts.make_text(pick(rng, texts.KINDS), rng)
    return {"prompt": task.question, "response": task.answer}


_MAKERS: dict[str, Callable[[np.random.Generator], Members]] = {
    "text_to_image": _drawable, "contrast": _captioned, "edit": _edit, "understand": _understand, "segment": _segment,
    "reconstruct": _segment, "decode": _decodable, "autoencode": _picture,
}  # fmt: skip
