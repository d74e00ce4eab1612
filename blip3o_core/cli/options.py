"""Options that several subcommands share, and the pipeline they describe."""

import argparse
import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from .progress import ProgressBars

if TYPE_CHECKING:
    from ..pipelines.blip3o import Blip3oPipeline

MODEL_VARIABLE = "BLIP3O_MODEL"


def add_model_arguments(parser: argparse.ArgumentParser, *, loras: bool = True) -> None:
    """loras: offer --lora, which adapts the networks of this command."""
    parser.add_argument("--model", metavar="PATH", default=None,
                        help=f"checkpoint folder (default: the environment variable {MODEL_VARIABLE}, else nano, the small model in this "
                        "package)")  # fmt: skip
    parser.add_argument("--decoder", metavar="PATH", help="folder of the diffusion decoder: SDXL, or SigLIP2 + SANA, which "
                        "only reconstructs (default: diffusion-decoder/ of the model)")  # fmt: skip
    parser.add_argument("--qwen", metavar="PATH", help="folder or file of the Qwen2.5-VL-Instruct that a split model takes its backbone "
                        "from (see blip3o split)")  # fmt: skip
    parser.add_argument("--offload", default="auto", choices=("auto", "none", "stage", "layer"), help="what is in memory at once: none "
                        "keeps all networks, stage those of one stage, layer one layer at a time, which is slow; auto looks at the free "
                        "memory (default: %(default)s)")  # fmt: skip
    parser.add_argument("--sana-positions", choices=("sincos", "none"), help="position table of a SANA decoder; the file doesn't say which "
                        "(default: sincos)")  # fmt: skip
    parser.add_argument("--decoder-scheduler", choices=("dpmsolver++", "euler"), help="of the decoder. SDXL: euler is the "
                        "reference, dpmsolver++ takes half of its steps. SANA: as it was trained (default: euler, or that of the SANA "
                        "layout)")  # fmt: skip
    parser.add_argument("--device", default="auto", help='"cpu", "cuda", "cuda:1", "mps" (default: %(default)s)')
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"),
                        help="precision of the networks (default: float32 on the CPU, bfloat16 elsewhere)")
    parser.set_defaults(lora=[], lora_any_base=False)
    if loras:
        parser.add_argument("--lora", type=lora_choice, action="append", metavar="FILE[:STRENGTH]", help="add a LoRA file with this "
                            "strength (default: 1); may be given several times")  # fmt: skip
        parser.add_argument("--lora-any-base", action="store_true", help="also take a LoRA that was trained on another model, if its "
                            "layers fit")  # fmt: skip


def lora_choice(text: str) -> tuple[Path, float]:
    """ "FILE:0.8" -> (FILE, 0.8). Without a number behind the last colon, or if there is a file of that whole name, all is the name."""
    name, colon, number = text.rpartition(":")
    with contextlib.suppress(ValueError):
        if colon and name and math.isfinite(strength := float(number)) and not os.path.exists(os.path.expanduser(text)):
            return Path(name), strength
    return Path(text), 1.0


def add_vision_encoder_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vision-encoder", metavar="PATH", help="folder or file of the EVA-CLIP tower, which turns pictures into "
                        "embeddings (default: the one inside the model)")  # fmt: skip


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest answer (default: %(default)s)")
    group.add_argument("--temperature", type=float, default=0.0, metavar="T",
                       help="0 always takes the likeliest token, higher varies more, 0..10 (default: %(default)s)")
    group.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens up to this probability, 0..1")
    group.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="same seed, same answer (default: %(default)s)")
    group.add_argument("--system", metavar="TEXT", help='the system turn (default: "You are a helpful assistant.")')
    group.add_argument("--min-pixels", type=int, metavar="N", help="pictures with fewer pixels are enlarged to N (default: 3136)")
    group.add_argument("--max-pixels", type=int, metavar="N",
                       help="pictures with more are shrunk to N; 784 pixels are one token (default: 12845056)")


def answer_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `Chat.say`. Raises InputError for values out of range, before weights are read."""
    from ..pipelines.chat import MAX_PIXELS, MIN_PIXELS, token_picker

    token_picker(args.temperature, args.top_p, args.top_k, args.seed)
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {args.max_new_tokens} must be at least 1.")
    low = MIN_PIXELS if args.min_pixels is None else args.min_pixels
    high = MAX_PIXELS if args.max_pixels is None else args.max_pixels
    if not 0 < low <= high:
        raise InputError(f"--min-pixels {low} and --max-pixels {high} leave no size; 0 < min <= max.")
    return {
        "max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k,
        "seed": args.seed, "min_pixels": low, "max_pixels": high,
    }  # fmt: skip


def chosen_model(args: argparse.Namespace) -> str:
    """--model, or the environment variable, or the nano of this package, whatever folders of that name there are."""
    from ..variants.blip3o import NANO_FOLDER

    return args.model or os.environ.get(MODEL_VARIABLE) or str(NANO_FOLDER)


def open_pipeline(args: argparse.Namespace, bars: ProgressBars, vision_encoder: str | Path | None = None) -> "Blip3oPipeline":
    """Opens and checks the files; weights are read when they are needed. Raises CheckpointError, InputError."""
    from ..pipelines.blip3o import Blip3oPipeline

    return Blip3oPipeline.from_pretrained(
        chosen_model(args), device=args.device, dtype=args.dtype, decoder=args.decoder, vision_encoder=vision_encoder,
        loras=args.lora, allow_other_base=args.lora_any_base, sana_positions=args.sana_positions,
        decoder_scheduler=args.decoder_scheduler, offload=args.offload, qwen=args.qwen, on_load=bars.on_load,
    )  # fmt: skip


@contextlib.contextmanager
def memory_errors(device: object, doing: str, advice: str) -> Iterator[None]:
    """An exhausted device becomes an InputError that names the options which take less."""
    from ..runtime import first_line, is_out_of_memory

    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(f"out of memory on {device} while {doing} ({first_line(error)}). {advice}") from error
