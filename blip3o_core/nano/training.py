"""Trains nano from nothing: data, untrained checkpoint, the stages of recipes/nano, one packed checkpoint with its card.

Everything is a folder below one output folder; what is finished is kept, and what was interrupted goes on where it was. A stage starts
from the untrained checkpoint with what the stages that it needs have trained, so stages that don't need each other may run side by side.
"""

import dataclasses
import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.save import DECODER_FOLDER, DECODER_STEM, DECODER_VARIANTS, Deferred, whole_folder, write_safetensors
from ..checkpoint.shards import TensorEntry, open_shards
from ..errors import InputError, TrainingError
from ..evaluate.shapes import evaluate
from ..files import require_writable, write_text
from ..pipelines.blip3o import Blip3oPipeline
from ..shapes.datasets import write_datasets
from ..train.config import DataOptions, TrainConfig, load_config, print_config
from .card import stage_record, write_card
from .skeleton import write_skeleton

log = logging.getLogger(__name__)

RECIPES = Path(__file__).parents[1] / "recipes" / "nano"
DATA, SKELETON, START, MODEL = "data", "skeleton", "start", "model"
STAGES: dict[str, tuple[str, ...]] = {
    "1-clip": (), "2-vae": (), "3-decoder": ("1-clip", "2-vae"), "4-eyes": (), "5-backbone": ("1-clip", "4-eyes"),
    "6-dit": ("1-clip", "4-eyes", "5-backbone"),
}  # fmt: skip
"""Stage -> the stages whose networks it learns from, earlier ones first. The numbers are the order of the paper."""
COUNTS = {
    "contrast": 30_000, "autoencode": 20_000, "decode": 60_000, "segment": 60_000, "understand": 100_000, "text": 40_000,
    "text_to_image": 100_000, "edit": 60_000, "reconstruct": 15_000,
}  # fmt: skip
"""Samples of each task."""
TENSORS = {
    "clip": ("model.gen_vision_tower.",), "backbone": ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head."),
    "vision": ("visual.",), "dit": ("model.dit.",), "latent_queries": ("model.latent_queries",),
}  # fmt: skip
"""Part of a run -> beginnings of the names of its tensors in the root shards."""
DECODER_PARTS = {"decoder": "unet", "vae": "vae"}
POLL_S = 0.2


def recipe(stage: str) -> Path:
    """Its configuration, with paths relative to the output folder."""
    return RECIPES / f"{stage}.toml"


def train_nano(
    output: Path, *, seed: int = 0, device: str = "auto", jobs: int = 1, steps: int | None = None, samples: int | None = None,
    workers: int | None = None, scores: bool = True,
) -> int:  # fmt: skip
    """Trains all stages -> 0, or the signal that stopped it; calling it again goes on.

    Args:
        jobs: stages that run side by side, each with its share of the CPU's cores. Another number rounds differently.
        steps, samples: of every stage, without validation, and at most so many of every task: a quick run that tests the whole way.
        workers: processes that draw the training pictures; None is one per core.
        scores: measure the model with `blip3o evaluate shapes` and write that into its card.
    Raises: Blip3oError of any kind; what was finished stays.
    """
    for name, value in (("jobs", jobs), ("steps", steps), ("samples", samples), ("workers", workers)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value}: give at least 1.")
    require_writable([output], output)
    cores = os.cpu_count() or 1
    counts = {task: count if samples is None else min(samples, count) for task, count in COUNTS.items()}
    write_datasets(output / DATA, seed=seed, counts=counts, workers=workers or cores)
    if not (output / SKELETON).is_dir():
        write_skeleton(output / SKELETON, seed=seed)
    stopped = _run_stages(output, jobs, max(1, cores // jobs), {"seed": seed, "device": device, "steps": steps})
    if stopped:
        return stopped
    combine(output, tuple(STAGES), output / MODEL)
    reports = measure(output / MODEL, device) if scores else {}
    write_card(output / MODEL / "README.md", [stage_record(output / stage) for stage in STAGES], machine=describe_machine(),
               scores=reports)  # fmt: skip
    log.info("%s", output / MODEL)
    return 0


def _run_stages(output: Path, jobs: int, threads: int, settings: dict[str, Any]) -> int:
    """Starts each stage as a process of its own when those that it needs are done -> 0, or the signal that stopped it."""
    done = {stage for stage in STAGES if is_done(output, stage)}
    running: dict[str, subprocess.Popen] = {}
    with _forwarded_signals(running) as received:
        while len(done) < len(STAGES):
            for stage, needs in STAGES.items():
                ready = stage not in done and stage not in running and done.issuperset(needs)
                if ready and len(running) < jobs and not received:
                    running[stage] = _start(output, stage, threads, settings)
            time.sleep(POLL_S)
            for stage, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[stage]
                if is_done(output, stage):
                    done.add(stage)
                elif not received:
                    for other in running.values():
                        other.send_signal(signal.SIGTERM)  # saves
                    raise TrainingError(f"stage {stage} ended with status {process.returncode}; its messages are above. What was done is "
                                        "kept: the same command goes on.")  # fmt: skip
            if received and not running:
                return received[0]
    return 0


def _start(output: Path, stage: str, threads: int, settings: dict[str, Any]) -> subprocess.Popen:
    log.info("stage %s", stage)
    start = output / stage / START
    if not start.is_dir():
        combine(output, STAGES[stage], start)
    file = output / stage / "stage.toml"
    write_text(file, print_config(stage_config(output, stage, **settings)))
    return subprocess.Popen([sys.executable, "-m", "blip3o_core.train", str(file)], env={**os.environ, "OMP_NUM_THREADS": str(threads)})


@contextmanager
def _forwarded_signals(running: dict[str, subprocess.Popen]) -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM reach the stages, which save and end; -> what has come."""
    received: list[int] = []

    def forward(number: int, _frame: object) -> None:
        received.append(number)
        for process in running.values():
            process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_done(output: Path, stage: str) -> bool:
    """Whether it has come to its end."""
    return (output / stage / MODEL / "config.json").is_file()


def stage_config(output: Path, stage: str, *, seed: int = 0, device: str = "auto", steps: int | None = None) -> TrainConfig:
    """The recipe with its paths below `output`."""
    config = load_config(recipe(stage))

    def placed(data: Sequence[DataOptions]) -> tuple[DataOptions, ...]:
        return tuple(dataclasses.replace(own, path=str(output / own.path)) for own in data)

    train = dataclasses.replace(config.train, seed=seed, device=device)
    optimizer, validation = config.optimizer, dataclasses.replace(config.validation, data=placed(config.validation.data))
    if steps is not None:
        train, validation = dataclasses.replace(train, steps=steps), dataclasses.replace(validation, every=0)
        optimizer = dataclasses.replace(optimizer, warmup_steps=min(optimizer.warmup_steps, steps))
    return dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=str(output / stage / START)), train=train, optimizer=optimizer,
        data=placed(config.data), validation=validation,
        output=dataclasses.replace(config.output, folder=str(output / stage), resume="latest"),
    )  # fmt: skip


def combine(output: Path, stages: Sequence[str], target: Path) -> None:
    """The untrained checkpoint with what the stages have trained, one file per part. Replaces what is there. Raises OutputError."""
    base = output / SKELETON
    root = open_shards(base, "model")
    decoders = {part: base / DECODER_FOLDER / part for part in ("unet", "vae", "scheduler")}
    for stage in stages:
        model = output / stage / MODEL
        trained = open_shards(model, "model")
        for part in load_config(recipe(stage)).train.parts:
            root |= {name: trained[name] for name in root if name.startswith(TENSORS.get(part, ()))}
            if part in DECODER_PARTS:
                decoders[DECODER_PARTS[part]] = model / DECODER_FOLDER / DECODER_PARTS[part]
    with whole_folder(target, overwrite=True) as temporary:
        for file in base.iterdir():
            if file.is_file() and not file.name.startswith("model"):
                shutil.copyfile(file, temporary / file.name)
        _write(root, temporary / "model.safetensors")
        for part, source in decoders.items():
            folder = temporary / DECODER_FOLDER / part
            folder.mkdir(parents=True)
            for file in source.glob("*.json"):
                shutil.copyfile(file, folder / file.name)
            if part != "scheduler":
                _write(open_shards(source, DECODER_STEM, DECODER_VARIANTS), folder / f"{DECODER_STEM}.safetensors")


def _write(entries: dict[str, TensorEntry], file: Path) -> None:
    write_safetensors(file, {name: Deferred.stored(entry) for name, entry in entries.items()}, {"format": "pt"})


def measure(model: Path, device: str) -> dict[str, Any]:
    """Split -> report of `evaluate shapes`."""
    pipe = Blip3oPipeline.from_pretrained(model, device=device)
    reports = {}
    for split in ("held-out", "seen"):
        log.info("evaluating %s combinations", split)
        reports[split], _ = evaluate(pipe, held_out=split == "held-out")
        write_text(model.parent / f"scores-{split}.json", json.dumps(reports[split], indent=1) + "\n")
    return reports


def describe_machine() -> str:
    """Processor or GPU, and the version of torch."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores ({platform.machine()})"
    return f"{name}, torch {torch.__version__}"
