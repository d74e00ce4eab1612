"""Look into LoRA files, convert, merge and shrink them."""

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from ..errors import InputError, OutputError, readable
from .inspect import size
from .options import lora_choice
from .progress import ProgressBars

EXAMPLES = """examples:
  blip3o lora inspect fox.safetensors
  blip3o lora convert fox.safetensors fox-peft/
  blip3o lora merge BLIP3o-Model-4B fox.safetensors:0.8 --output BLIP3o-Model-4B-fox
  blip3o lora resize fox.safetensors --rank 8 --output fox-8.safetensors

`blip3o lora COMMAND --help` tells more. LoRAs are used by --lora FILE:STRENGTH of the commands that draw and answer, and by the
LoRA loaders of ComfyUI.
"""
COMMANDS = {
    "inspect": ("Show what a LoRA file holds: base, rank, layers, size, norm of its updates.", """examples:
  blip3o lora inspect fox.safetensors
  blip3o lora inspect fox.safetensors --json

The norm is that of all updates at strength 1. A LoRA that was never trained has the norm 0.
"""),
    "convert": ("Turn a LoRA file into a folder of peft, or such a folder into a file.", """examples:
  blip3o lora convert fox.safetensors fox-peft/
  blip3o lora convert fox-peft/ fox.safetensors
  blip3o lora convert dora.safetensors dora-peft/ --model BLIP3o-Model-4B

SOURCE decides: a folder becomes a file, a file a folder. Nothing is lost: a file that went through a folder is the same again.
PeftModel.from_pretrained(pipe.dit, "fox-peft") loads the adapters of the diffusion transformer, "fox-peft/language_model" those
of the language model. A DoRA file for ComfyUI has magnitudes relative to its base, which --model then names.
"""),
    "merge": ("Write a checkpoint with LoRAs merged into its weights.", """examples:
  blip3o lora merge BLIP3o-Model-4B fox.safetensors --output BLIP3o-Model-4B-fox
  blip3o lora merge BLIP3o-Model-4B fox.safetensors:0.8 style.safetensors:0.5 --output mixed

The folder is complete: it is used as --model, and given away as it is. Files that don't change are hard links to those of MODEL,
which take no space (copies on another disk).
"""),
    "resize": ("Write a smaller LoRA: the best approximation with a lower rank.", """examples:
  blip3o lora resize fox.safetensors --rank 8 --output fox-8.safetensors

Prints the share of the norm of the updates that is kept, over all layers and in the worst one. Below 90 % the difference is
usually visible.
"""),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="lora_command", metavar="COMMAND", required=True)
    for name, (summary, examples) in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        ARGUMENTS[name](command)


def run(args: argparse.Namespace) -> None:
    """Raises Blip3oError; existing files and folders are replaced only with --overwrite."""
    RUN[args.lora_command](args)


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="LoRA file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="LoRA file, or folder of peft")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="what to write: a folder, or a .safetensors file")
    parser.add_argument("--model", metavar="PATH", help="the base, needed only for a DoRA file with ComfyUI's magnitudes")
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT if it exists")


def _merge_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint folder; stays as it is")
    parser.add_argument("lora", nargs="+", type=lora_choice, metavar="LORA[:STRENGTH]", help="LoRA files, merged in this order")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--lora-any-base", action="store_true", help="also take a LoRA of another model, if its layers fit")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint in --output if there is one")


def _resize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="LoRA file; stays as it is")
    parser.add_argument("--rank", type=int, required=True, metavar="R", help="highest rank to keep, at most that of FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace --output if it exists")


def _inspect(args: argparse.Namespace) -> None:
    description = describe(args.file)
    print(json.dumps(description, indent=2, ensure_ascii=False) if args.json else as_text(description))


def describe(path: Path) -> dict[str, Any]:
    """Metadata, and per component layers, ranks, alphas, parameters, bytes and the norm of the updates at strength 1."""
    from ..lora.files import read_lora
    from ..lora.resize import update_norm

    lora = read_lora(path)
    components: dict[str, Any] = {}
    for name in lora.adapters.keys() | lora.differences.keys():
        adapters, differences = lora.adapters.get(name, {}), lora.differences.get(name, {})
        tensors = [tensor for adapter in adapters.values() for tensor in adapter.tensors] + list(differences.values())
        components[name] = {
            "layers": len(adapters),
            "other_parameters": len(differences),
            "ranks": sorted({adapter.rank for adapter in adapters.values()}),
            "alphas": sorted({adapter.alpha for adapter in adapters.values()}),
            "dora": any(adapter.magnitude is not None for adapter in adapters.values()),
            **_totals(tensors),
            "norm": sum(update_norm(adapter) ** 2 for adapter in adapters.values()) ** 0.5,
        }
    if lora.queries is not None:
        components["latent_queries"] = {"layers": 1, **_totals([lora.queries]), "norm": lora.queries.double().norm().item()}
    return {"path": str(path), "components": dict(sorted(components.items())), "metadata": dict(sorted(lora.metadata.items()))}


def _totals(tensors: list) -> dict[str, Any]:
    return {
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}),
    }


def as_text(description: dict[str, Any]) -> str:
    """A table, and the metadata."""
    head = f"{'component':<16}{'layers':>8}{'rank':>8}{'alpha':>8}{'parameters':>14}{'size':>11}{'norm':>10}  dtype"
    lines = [description["path"], "", head]
    for name, part in description["components"].items():
        rank, alpha = (", ".join(f"{value:g}" for value in part.get(key, [])) or "-" for key in ("ranks", "alphas"))
        notes = [", ".join(part["dtypes"]), *(["DoRA"] if part.get("dora") else [])]
        if part.get("other_parameters"):
            notes.append(f"and {part['other_parameters']} norms and biases")
        lines.append(f"{name:<16}{part['layers']:>8}{rank:>8}{alpha:>8}{part['parameters']:>14,}{size(part['bytes']):>11}"
                     f"{part['norm']:>10.4g}  {'; '.join(notes)}")  # fmt: skip
    lines += ["", *(f"{key} = {value}" for key, value in description["metadata"].items())]
    return readable("\n".join(lines).rstrip())


def _convert(args: argparse.Namespace) -> None:
    from ..lora.files import read_lora, write_lora
    from ..lora.peft_folder import read_peft_folder, write_peft_folder

    if args.source.is_dir():
        _require_new_file(args.output, args.overwrite)
        write_lora(args.output, read_peft_folder(args.source))
    else:
        lora = read_lora(args.source)
        if args.model is not None:
            lora = _for_peft(lora, args.model, args.source)
        write_peft_folder(args.output, lora, overwrite=args.overwrite)
    print(args.output)


def _for_peft(lora: Any, model: str, source: Path) -> Any:
    """With magnitudes as peft wants them. Raises InputError if `lora` wasn't trained on `model`."""
    import torch

    from ..lora.apply import for_peft
    from ..lora.chosen import open_loras
    from ..variants.blip3o import Blip3oCheckpoint

    checkpoint = Blip3oCheckpoint.open(model)
    open_loras(checkpoint, [(source, 1.0)])
    networks: dict[str, torch.nn.Module] = {}
    if "dit" in lora.adapters:
        networks["dit"] = checkpoint.load_dit(dtype=torch.float32)
    if "language_model" in lora.adapters:
        networks["language_model"] = checkpoint.load_backbone(dtype=None).language_model
    return for_peft(lora, networks)


def _merge(args: argparse.Namespace) -> None:
    from ..lora.chosen import open_loras
    from ..lora.merged_checkpoint import save_merged
    from ..variants.blip3o import Blip3oCheckpoint

    checkpoint = Blip3oCheckpoint.open(args.model)
    loras = open_loras(checkpoint, args.lora, allow_other_base=args.lora_any_base)
    with ProgressBars() as bars:
        count = save_merged(checkpoint, loras, args.output, overwrite=args.overwrite, on_write=bars.on_write)
    logging.getLogger(__name__).info("%d tensors changed", count)
    print(args.output)


def _resize(args: argparse.Namespace) -> None:
    from ..lora.files import read_lora, write_lora
    from ..lora.resize import resize

    _require_new_file(args.output, args.overwrite)
    resized = resize(read_lora(args.file), args.rank)
    write_lora(args.output, resized.lora)
    print(f"{args.output}: rank {args.rank} keeps {resized.kept:.2%} of the norm of the updates, "
          f"{resized.kept_least:.2%} in the worst layer")


def _require_new_file(path: Path, overwrite: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder. Give the name of a .safetensors file to write.")
    if path.suffix != ".safetensors":
        raise InputError(f"{path}: LoRA files are .safetensors. Give such a name.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists. Give another name, or --overwrite to replace it.")
    if not path.parent.is_dir():
        raise OutputError(f"{path}: there is no folder {path.parent}. Make it first.")


ARGUMENTS = {"inspect": _inspect_arguments, "convert": _convert_arguments, "merge": _merge_arguments, "resize": _resize_arguments}
RUN = {"inspect": _inspect, "convert": _convert, "merge": _merge, "resize": _resize}
