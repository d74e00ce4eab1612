"""Trains nano from nothing: data, untrained checkpoint, the stages of recipes/nano in their order, one packed checkpoint.

Everything is a folder below one output folder; what is finished is kept, and what was interrupted goes on where it was.
"""

import dataclasses
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from ..checkpoint.save import DECODER_FOLDER, DECODER_STEM, DECODER_VARIANTS, Deferred, whole_folder, write_safetensors
from ..checkpoint.shards import open_shards
from ..errors import InputError
from ..files import require_writable
from ..shapes.datasets import write_datasets
from ..train.config import DataOptions, TrainConfig, load_config
from ..train.run import run_training
from .card import stage_record, write_card
from .skeleton import write_skeleton

log = logging.getLogger(__name__)

RECIPES = Path(__file__).parents[1] / "recipes" / "nano"
DATA, SKELETON, MODEL = "data", "skeleton", "model"
COUNTS = {
    "contrast": 30_000, "autoencode": 20_000, "understand": 60_000, "text": 40_000, "text_to_image": 100_000, "edit": 60_000,
    "reconstruct": 15_000,
}  # fmt: skip
"""Samples of each task."""


def stages() -> list[Path]:
    """The recipe of each stage, in order."""
    return sorted(RECIPES.glob("*.toml"))


def train_nano(
    output: Path, *, seed: int = 0, device: str = "auto", steps: int | None = None, samples: int | None = None, workers: int | None = None
) -> int:
    """Trains all stages -> 0, or the signal that stopped it; calling it again goes on.

    Args:
        steps, samples: of every stage, and at most so many of every task: a quick run that tests the whole way.
        workers: processes that draw the training pictures; None is one per core.
    Raises: Blip3oError of any kind; what was finished stays.
    """
    for name, value in (("steps", steps), ("samples", samples), ("workers", workers)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: give at least 1.")
    require_writable([output], output)
    counts = {task: count if samples is None else min(samples, count) for task, count in COUNTS.items()}
    write_datasets(output / DATA, seed=seed, counts=counts, workers=workers or os.cpu_count() or 1)
    model = output / SKELETON
    if not model.is_dir():
        write_skeleton(model, seed=seed)
    for number, recipe in enumerate(stages(), start=1):
        config = stage_config(recipe, output, model, seed=seed, device=device, steps=steps)
        folder = Path(config.output.folder)
        model = folder / "model"
        if (model / "config.json").is_file():
            log.info("stage %d of %d, %s: finished before", number, len(stages()), recipe.stem)
            continue
        log.info("stage %d of %d, %s", number, len(stages()), recipe.stem)
        stopped = run_training(config)
        if stopped:
            return stopped
    pack(model, output / MODEL)
    write_card(output / MODEL / "README.md", [stage_record(output / recipe.stem) for recipe in stages()], machine=describe_machine())
    log.info("%s", output / MODEL)
    return 0


def stage_config(
    recipe: Path, output: Path, model: Path, *, seed: int = 0, device: str = "auto", steps: int | None = None
) -> TrainConfig:  # fmt: skip
    """A recipe with its paths below `output`, which train from `model`."""
    config = load_config(recipe)

    def placed(data: Sequence[DataOptions]) -> tuple[DataOptions, ...]:
        return tuple(dataclasses.replace(own, path=str(output / own.path)) for own in data)

    train = dataclasses.replace(config.train, seed=seed, device=device)
    optimizer = config.optimizer
    if steps is not None:
        train = dataclasses.replace(train, steps=steps)
        optimizer = dataclasses.replace(optimizer, warmup_steps=min(optimizer.warmup_steps, steps))
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=str(model)), train=train, optimizer=optimizer, data=placed(config.data),
        validation=dataclasses.replace(config.validation, data=placed(config.validation.data)),
        output=dataclasses.replace(config.output, folder=str(output / recipe.stem), resume="latest"),
    )  # fmt: skip


def pack(model: Path, target: Path) -> None:
    """A checkpoint that stages have linked together -> one file per part. Replaces what is there. Raises OutputError."""
    with whole_folder(target, overwrite=True) as temporary:
        for file in model.iterdir():
            if file.is_file() and not file.name.startswith("model"):
                shutil.copyfile(file, temporary / file.name)
        _pack(open_shards(model, "model"), temporary / "model.safetensors")
        for part in ("unet", "vae", "scheduler"):
            source, folder = model / DECODER_FOLDER / part, temporary / DECODER_FOLDER / part
            folder.mkdir(parents=True)
            for file in source.glob("*.json"):
                shutil.copyfile(file, folder / file.name)
            if part != "scheduler":
                _pack(open_shards(source, DECODER_STEM, DECODER_VARIANTS), folder / f"{DECODER_STEM}.safetensors")


def _pack(entries, file: Path) -> None:
    write_safetensors(file, {name: Deferred.stored(entry) for name, entry in entries.items()}, {"format": "pt"})


def describe_machine() -> str:
    """Processor or GPU, and the version of torch."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{name}, torch {torch.__version__}"


