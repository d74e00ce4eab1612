"""A few small pictures with words, and configurations and models over them: what the tests of training share."""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from blip3o_core.data.prepare import Example
from blip3o_core.train.build import build_model, frozen_dtype
from blip3o_core.train.config import TrainConfig, load_config
from blip3o_core.train.datasets import validation_examples
from blip3o_core.train.frozen import FrozenNetworks
from blip3o_core.train.model import TrainingModel
from blip3o_core.train.noise import Draw
from blip3o_core.train.run import Opened, open_run

DATA = Path(__file__).parents[1] / "data" / "sdxl"
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 70), "blue": (40, 80, 220), "yellow": (240, 200, 40)}
SOURCES = {"text_to_image": "pictures", "reconstruct": "pictures", "decode": "pictures", "contrast": "pictures", "autoencode": "pictures",
           "segment": "segments.tar", "edit": "edits.json", "understand": "questions.json", "text": "text.jsonl"}  # fmt: skip


def write_data(folder: Path) -> Path:
    """Pictures with captions, maps of labels, edits, questions and text."""
    (folder / "pictures").mkdir(parents=True)
    for number, (name, colour) in enumerate(COLOURS.items()):
        image = Image.new("RGB", (96, 80), "white")
        ImageDraw.Draw(image).rectangle((20, 15, 60, 65), fill=colour)
        image.save(folder / f"pictures/{number}.png")
        (folder / f"pictures/{number}.txt").write_text(f"a {name} square")
    with tarfile.open(folder / "segments.tar", "w") as tar:
        for number in range(2):
            labels = Image.new("RGB", (96, 80))
            ImageDraw.Draw(labels).rectangle((20, 15, 60, 65), fill=(1, 1 + number, 0))
            labels.save(folder / f"{number}.labels.png")
            tar.add(folder / f"pictures/{number}.png", f"{number}.png")
            tar.add(folder / f"{number}.labels.png", f"{number}.labels.png")
    edits = [{"source": "pictures/0.png", "instruction": "make it blue", "target": "pictures/2.png"},
             {"source": "pictures/2.png", "instruction": "make it red", "target": "pictures/0.png"}]  # fmt: skip
    questions = [
        {"id": 1, "image": "pictures/0.png", "conversations": [{"from": "human", "value": "<image>\nWhat colour?"},
                                                               {"from": "gpt", "value": "red"}]},
        {"id": 2, "image": "pictures/2.png", "conversations": [{"from": "human", "value": "<image>\nWhat colour?"},
                                                               {"from": "gpt", "value": "it is blue"}]},
    ]  # fmt: skip
    (folder / "edits.json").write_text(json.dumps(edits))
    (folder / "questions.json").write_text(json.dumps(questions))
    (folder / "text.jsonl").write_text('{"prompt": "say red", "response": "red"}\n{"prompt": "say blue", "response": "blue"}\n')
    return folder


def training_config(data: Path, output: Path, tasks: Sequence[str], *overrides: str, checkpoint: Path | None = None) -> TrainConfig:
    """One dataset per task, on the CPU, without workers."""
    words = [f"model.path={checkpoint or DATA / 'checkpoint'}", f"model.vision_encoder={DATA / 'eva_clip_vision_tower'}",
             f"output.folder={output}", "train.device=cpu", "loader.workers=0", "loader.max_pixels=3136", "output.log_every=1",
             "objective.picture_size=32", "train.batch_size=4"]  # fmt: skip
    for index, task in enumerate(tasks):
        words += [f"data.{index}.path={data / SOURCES[task]}", f"data.{index}.task={task}"]
    return load_config(None, [*words, *overrides])


@dataclass
class Prepared:
    """What a run works with, before its first update."""

    opened: Opened
    frozen: FrozenNetworks
    model: TrainingModel
    examples: list[Example]

    @property
    def draws(self) -> list[Draw]:
        return [Draw((0, "test", index)) for index in range(len(self.examples))]

    def losses(self) -> torch.Tensor:
        return self.model(self.examples, self.draws)

    def gradients(self) -> dict[str, torch.Tensor]:
        """After one backward pass of the mean loss."""
        self.model.zero_grad()
        self.losses().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in self.model.trained().items() if parameter.grad is not None}


def prepare(config: TrainConfig, precision: str = "fp32", per_task: int = 2) -> Prepared:
    """Opens and loads as a run does."""
    opened = open_run(config, precision)
    frozen = FrozenNetworks(opened.sources, device=torch.device("cpu"), dtype=frozen_dtype(precision))
    model = build_model(config, opened.sources, frozen, opened.sets.tasks, precision=precision)
    model.set_training(True)
    return Prepared(opened, frozen, model, validation_examples(opened.sets, per_task))
