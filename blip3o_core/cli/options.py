"""Options that several subcommands share."""

import argparse
import os

from ..errors import InputError

MODEL_VARIABLE = "BLIP3O_MODEL"


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="PATH", help=f"checkpoint folder (default: the environment variable {MODEL_VARIABLE})")
    parser.add_argument("--decoder", metavar="PATH", help="folder of the diffusion decoder (default: diffusion-decoder/ of the model)")
    parser.add_argument("--device", default="auto", help='"cpu", "cuda", "cuda:1", "mps" (default: %(default)s)')
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16", "fp32", "bf16", "fp16"),
                        help="precision of the networks (default: float32 on the CPU, bfloat16 elsewhere)")


def required_model(args: argparse.Namespace) -> str:
    """--model, or the environment variable. Raises InputError if neither is given."""
    model = args.model or os.environ.get(MODEL_VARIABLE)
    if not model:
        raise InputError(f"no model was given. Name a checkpoint folder: --model PATH, or set {MODEL_VARIABLE}.")
    return model
