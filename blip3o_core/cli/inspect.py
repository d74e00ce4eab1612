"""Show what a checkpoint holds and what each task would load. Reads headers only."""

import argparse
import json
from collections.abc import Iterable
from typing import Any

EXAMPLES = """examples:
  blip3o inspect BLIP3o-Model-4B
  blip3o inspect BLIP3o-Model-4B --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="checkpoint folder")
    parser.add_argument("--decoder", metavar="PATH", help="folder of the diffusion decoder, SDXL or SANA (default: diffusion-decoder/ of "
                        "PATH)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> None:
    """Raises CheckpointError if the folder is incomplete or damaged."""
    description = describe(args.path, args.decoder)
    print(json.dumps(description, indent=2) if args.json else as_text(description))


def describe(path: str, decoder: str | None = None) -> dict[str, Any]:
    """Components with parameters, dtypes and bytes, and bytes per task."""
    from ..variants.blip3o import SKIPPED, TASKS, Blip3oCheckpoint
    from ..variants.decoders import open_decoder
    from ..variants.sdxl_decoder import find_sdxl_decoder

    checkpoint = Blip3oCheckpoint.open(path)
    components = {name: summary(entries.values()) for name, entries in checkpoint.components.items() if entries}
    decoder_parts, has_encoder = ["decoder_unet", "decoder_vae"], False
    opened = None
    if decoder is not None or find_sdxl_decoder(checkpoint.folder) is not None:
        opened = open_decoder(decoder if decoder is not None else checkpoint.folder)
        components |= {name: summary(entries.values()) for name, entries in opened.components.items()}
        decoder_parts, has_encoder = list(opened.components), opened.has_encoder
    tasks = {}
    for task, parts in TASKS.items():
        needed = [*parts, *([] if task == "understanding" else decoder_parts)]
        if has_encoder and task == "reconstruction":
            needed = decoder_parts
        elif has_encoder and task != "understanding":
            continue  # it draws nothing that a prompt becomes
        if task == "understanding" and "output_head" not in components:
            needed.remove("output_head")  # tied: the embedding matrix serves as head
        tasks[task] = {
            "bytes": sum(components[part]["bytes"] for part in needed if part in components),
            "components": [part for part in needed if part in components],
            "missing": [part for part in needed if part not in components],
        }
    return {
        "path": str(checkpoint.folder),
        "model_type": checkpoint.config["model_type"],
        "queries": checkpoint.num_queries,
        "embedding_width": checkpoint.dit_config.in_channels,
        "decoder": None if opened is None else str(opened.folder),
        "components": components,
        "unused": sorted({SKIPPED} & components.keys()),
        "tasks": tasks,
    }


def summary(entries: Iterable) -> dict[str, Any]:
    """Totals of some tensors."""
    entries = list(entries)
    return {
        "tensors": len(entries),
        "parameters": sum(entry.numel for entry in entries),
        "dtypes": sorted({str(entry.dtype).removeprefix("torch.") for entry in entries}),
        "bytes": sum(entry.nbytes for entry in entries),
        "files": sorted({entry.file.name for entry in entries}),
    }


def as_text(description: dict[str, Any]) -> str:
    """Two tables."""
    lines = [
        f"{description['path']}  ({description['model_type']}, {description['queries']} queries, "
        f"embeddings of width {description['embedding_width']})",
        "",
        f"{'component':<16}{'tensors':>8}{'parameters':>17}{'size':>11}  dtype",
    ]
    for name, part in description["components"].items():
        note = "  (no task uses these)" if name in description["unused"] else ""
        lines.append(f"{name:<16}{part['tensors']:>8}{part['parameters']:>17,}{size(part['bytes']):>11}  {', '.join(part['dtypes'])}{note}")
    lines += ["", f"{'task':<30}{'loads':>11}  components"]
    for task, needs in description["tasks"].items():
        missing = f"  MISSING: {', '.join(needs['missing'])}" if needs["missing"] else ""
        lines.append(f"{task:<30}{size(needs['bytes']):>11}  {', '.join(needs['components'])}{missing}")
    return "\n".join(lines)


def size(nbytes: int) -> str:
    """1024-based, three digits."""
    value, units = float(nbytes), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while value >= 1000 and unit != "GiB":
        value, unit = value / 1024, next(units)
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
