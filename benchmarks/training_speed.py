"""Samples per second and peak memory of training, through the trainer itself.

    python benchmarks/training_speed.py [--model PATH] [--device cuda] [--batch-size 4] [--steps 20] [--json]

Trains on synthetic pictures and captions: LoRA on the DiT, LoRA on DiT and language model, the full DiT. Each runs in a process of its own,
so that its peak memory is its own; the first updates warm up, the median of the others is printed. Without --model the
tiny random checkpoint of the tests is trained, whose numbers say something about overhead only.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TINY = Path(__file__).parents[1] / "tests" / "data" / "sdxl"
RUNS = {
    "LoRA, DiT": ['lora.parts=["dit"]'],
    "LoRA, DiT and language model": ['lora.parts=["dit", "language_model"]', "lora.latent_queries=true"],
    "full, DiT": ["train.method=full", 'train.parts=["dit"]'],
}
WARM_UP = 3
PICTURES = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="checkpoint folder (default: the tiny one of the tests)")
    parser.add_argument("--vision-encoder", help="EVA-CLIP tower, if --model comes without it")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="measured updates")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", action="store_true", help="with cache.enabled: frozen networks run before")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    results = {}
    for name, words in RUNS.items():
        with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=processes) as pool:
            results[name] = own = pool.submit(measure, vars(args), words, folder).result()
        if not args.json:
            print(f"{name:<32}{own['samples_per_second']:>10.2f} samples/s{own['peak_memory_gib']:>10.2f} GiB", flush=True)
    if args.json:
        print(json.dumps(results))


def measure(args: dict, words: list[str], folder: str) -> dict[str, float]:
    """One run in this process."""
    import torch

    from blip3o_core.train import log, run
    from blip3o_core.train.config import load_config

    data = make_pictures(Path(folder) / "data")
    model = args["model"] or TINY / "checkpoint"
    tower = args["vision_encoder"] or ("" if args["model"] else TINY / "eva_clip_vision_tower")
    config = load_config(None, [
        f"model.path={model}", f"model.vision_encoder={tower}", f"data.0.path={data}", f"output.folder={folder}/run",
        f"train.device={args['device']}",
        f"train.precision={args['precision']}", f"train.batch_size={args['batch_size']}", f"train.steps={WARM_UP + args['steps']}",
        f"loader.workers={args['workers']}", "validation.every=0", f"cache.enabled={str(args['cache']).lower()}",
        f"train.gradient_checkpointing={str(args['gradient_checkpointing']).lower()}", *words, "output.save_every=0",
    ])  # fmt: skip
    times: list[float] = []
    peaks: list[int] = []

    def note(original):
        def train(self, step, **values):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            times.append(time.perf_counter())
            peaks.append(values["memory_bytes"])
            return original(self, step, **values)

        return train

    log.RunLog.train = note(log.RunLog.train)  # the trainer calls it once per update
    run.export_model = lambda *_, **__: None  # writing a whole checkpoint is not measured
    run.Session._save = lambda *_: None
    run.run_training(config)
    seconds = [after - before for before, after in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)]
    return {"samples_per_second": round(args["batch_size"] / statistics.median(seconds), 3), "peak_memory_gib": round(peaks[-1] / 2**30, 3),
            "updates": len(seconds)}  # fmt: skip


def make_pictures(folder: Path) -> Path:
    """Noise of 512 x 512 pixels, with captions of some twenty words."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    random = np.random.default_rng(0)
    for index in range(PICTURES):
        Image.fromarray(random.integers(0, 256, (512, 512, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("many small coloured dots without any order, and " + "one more, " * 8 + str(index))
    return folder


if __name__ == "__main__":
    main()
