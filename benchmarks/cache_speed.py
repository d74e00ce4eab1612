"""Steps per second of LoRA training with and without caches, and what the caches change in the losses.

    python benchmarks/cache_speed.py [--layers 48] [--steps 30] [--batch-size 4] [--rounds 2] [--json]

The tiny checkpoint of the tests gets a language model of --layers layers of the same width (random weights, float32, CPU), so that
the share of the backbone is as in the published models. Rounds alternate; the first steps of each run are not counted.
"""

import argparse
import contextlib
import io
import json
import re
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from blip3o_core.train.config import TrainConfig
from blip3o_core.train.log import read_log
from blip3o_core.train.options import build
from blip3o_core.train.run import run_training

TINY = Path(__file__).parents[1] / "tests" / "data" / "sdxl"
SKIPPED_STEPS = 10  # while memory is allocated for the first time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 48), ("steps", 30), ("batch-size", 4), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        result = measure(Path(folder), args)
    print(json.dumps(result) if args.json else "\n".join(f"{key:<32}{value}" for key, value in result.items()))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    checkpoint = deep_checkpoint(folder / "checkpoint", args.layers)
    pictures = draw_pictures(folder / "pictures")
    rates: dict[bool, list[float]] = {False: [], True: []}
    losses: dict[bool, list[float]] = {}
    for round_index in range(args.rounds):
        for cached in (False, True):
            output = folder / f"{round_index}-{cached}"
            run_training(build(TrainConfig, {
                "model": {"path": str(checkpoint), "vision_encoder": str(TINY / "eva_clip_vision_tower")},
                "train": {"steps": args.steps, "batch_size": args.batch_size, "device": "cpu", "precision": "fp32"},
                "data": [{"path": str(pictures)}, {"path": str(pictures), "task": "reconstruct"}],
                "cache": {"enabled": cached, "folder": str(folder / "cache")}, "loader": {"workers": 0}, "validation": {"every": 0},
                "output": {"folder": str(output), "log_every": 1},
            }))  # fmt: skip
            lines = [line for line in read_log(output) if line["kind"] == "train"]
            seconds = [args.batch_size / line["samples_per_second"] for line in lines[SKIPPED_STEPS:]]
            rates[cached].append(1 / statistics.median(seconds))
            losses[cached] = [line["loss"] for line in lines]
    plain, cached = (statistics.median(rates[each]) for each in (False, True))
    return {
        "steps/s without cache": round(plain, 2), "steps/s with cache": round(cached, 2), "ratio": round(cached / plain, 2),
        "largest difference of losses": max(abs(a - b) for a, b in zip(losses[False], losses[True], strict=True)),
    }  # fmt: skip


def deep_checkpoint(folder: Path, layers: int) -> Path:
    """A copy of the tiny checkpoint whose language model has `layers` layers, all others as they are."""
    shutil.copytree(TINY / "checkpoint", folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["num_hidden_layers"] = config["max_window_layers"] = layers
    (folder / "config.json").write_text(json.dumps(config, indent=2), "utf-8")
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in list(tensors.items()):
        if re.match(r"model\.layers\.0\.", name):
            for layer in range(layers):
                new = torch.randn(tensor.shape, generator=generator) * 0.02 if tensor.ndim > 1 else tensor.clone()
                tensors[name.replace("layers.0.", f"layers.{layer}.")] = new.to(tensor.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def draw_pictures(folder: Path) -> Path:
    folder.mkdir()
    for number in range(16):
        image = Image.new("RGB", (256, 256), "white")
        ImageDraw.Draw(image).ellipse((40, 40, 120 + 5 * number, 200), fill=(13 * number, 255 - 13 * number, 128))
        image.save(folder / f"{number:02}.png")
        (folder / f"{number:02}.txt").write_text(f"shape number {number}", "utf-8")
    return folder


if __name__ == "__main__":
    main()
