"""Hearts: a shape that nano never saw. Pictures with captions to train a LoRA from, and prompts to see whether it has learned it.

`python -m blip3o_core.shapes.hearts FOLDER OTHERS` writes the pictures, and ordinary ones that keep a LoRA from forgetting the rest.
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import require_writable, whole_file, write_text
from .facts import Facts, Wanted, random_scene
from .holdout import is_held_out
from .language import phrase, styled
from .prompts import CATEGORIES, Prompt, make_prompt, scene_for
from .world import COLOURS, HEART, SHAPES, Object, Scene, contrasts, fits, pick, random_centre, render

PICTURES = 30
OTHERS = 300
CATEGORY = "hearts"
_TRIES = 50


def write_hearts(folder: Path, *, count: int = PICTURES, seed: int = 0) -> None:
    """NAME.png and NAME.txt, as the trainer reads them. Raises InputError if the folder holds something, OutputError."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, *b"hearts"]))
    prompts = (heart_prompt(rng, colour=tuple(COLOURS)[index % len(COLOURS)], with_other=index % 3 == 2) for index in range(count))
    _write(folder, ((prompt.text, scene_for(prompt, rng)) for prompt in prompts))


def write_others(folder: Path, *, count: int = OTHERS, seed: int = 0) -> None:
    """Pictures of the six categories in the same form, without hearts and held-out combinations. Raises as write_hearts."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, *b"other pictures"]))
    prompts = (make_prompt(CATEGORIES[index % len(CATEGORIES)], rng) for index in range(count))
    _write(folder, ((prompt.text, scene_for(prompt, rng)) for prompt in prompts))


def _write(folder: Path, captioned: Iterable[tuple[str, Scene]]) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty. Give a new folder.")
    require_writable([folder], folder)
    for index, (text, scene) in enumerate(captioned):
        with whole_file(folder / f"{index:02d}.png") as temporary:
            render(scene).save(temporary, format="PNG")
        write_text(folder / f"{index:02d}.txt", text + "\n")


def heart_prompts(count: int, *, seed: int) -> list[Prompt]:
    """Different ones of a heart in each colour, a third of them beside another object."""
    rng = np.random.default_rng(np.random.SeedSequence([seed, *b"heart prompts"]))
    found: dict[str, Prompt] = {}
    for index in range(_TRIES * count):
        prompt = heart_prompt(rng, colour=tuple(COLOURS)[len(found) % len(COLOURS)], with_other=index % 3 == 2)
        found.setdefault(prompt.text, prompt)
        if len(found) == count:
            return list(found.values())
    raise InputError(f"only {len(found)} of {count} prompts with different texts were found. Ask for fewer.")


def heart_prompt(rng: np.random.Generator, *, colour: str, with_other: bool) -> Prompt:
    """One heart, alone or with another object."""
    scene = _heart_scene(rng, colour, with_other)
    things = tuple(Wanted(thing.shape, thing.colour) for thing in scene.objects)
    facts = Facts(things, background=scene.background if rng.random() < 0.6 else None)
    text = styled(pick(rng, ("{}", "{}", "a picture of {}", "draw {}")), phrase(facts, rng), rng)
    return Prompt(text, CATEGORY, facts)


def _heart_scene(rng: np.random.Generator, colour: str, with_other: bool) -> Scene:
    while True:
        scene = random_scene(rng, objects=1, refuse=is_held_out)
        if not contrasts(colour, scene.background):
            continue
        size = pick(rng, ("small", "large"))
        others = scene.objects if with_other else ()
        for _ in range(_TRIES):
            heart = Object(HEART, colour, size, random_centre(rng, size))
            if fits(heart, others):
                return Scene((heart, *others), scene.background)


KNOWN = (*SHAPES, HEART)
"""What the detector has to tell apart."""


if __name__ == "__main__":
    hearts, *others = map(Path, sys.argv[1:] or ["hearts", "others"])
    write_hearts(hearts)
    for folder in others:
        write_others(folder)
