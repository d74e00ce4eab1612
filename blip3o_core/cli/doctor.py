"""Check this machine: packages, devices, memory, models, and what would run."""

import argparse
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import Blip3oError
from .inspect import size
from .options import MODEL_VARIABLE

PACKAGE = "comfyui-blip3o"
MAX_DEPTH = 2  # DIR/NAME, or DIR/OWNER/NAME
ADVICE = {
    "none": "runs",
    "stage": "runs with --offload stage, which is chosen by itself",
    "layer": "runs with --offload layer, slowly; blip3o quantize makes a copy that takes less",
}

EXAMPLES = """examples:
  blip3o doctor
  blip3o doctor --models ComfyUI/models/blip3o
  blip3o doctor --json > report.json                  # to attach to a report

Looks at the current folder, BLIP3O_MODEL and --models. Reads headers of weights only; nothing is loaded or sent. The exit status is 1 if
something is broken.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--models", type=Path, action="append", default=[], metavar="DIR", help="a folder to look for models in; may be "
                        "given several times")  # fmt: skip
    parser.add_argument("--device", default="auto", help='what models would run on (default: %(default)s)')
    parser.add_argument("--dtype", default="auto", help="and in which precision (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Returns 1 if there are problems. Raises InputError for a device or dtype that there is not."""
    report = examine(args.models, args.device, args.dtype)
    print(json.dumps(report, indent=2) if args.json else as_text(report))
    return 1 if report["problems"] else 0


def examine(models: Sequence[Path], device: str, dtype: str) -> dict[str, Any]:
    """Everything that `as_text` shows; "problems" are what keeps things from running, each with its fix."""
    packages, problems = _packages()
    report = {"python": platform.python_version(), "system": platform.platform(), "packages": packages, "devices": [], "chosen": None,
              "disk": {}, "models": [], "problems": problems}  # fmt: skip
    try:
        return report | _hardware_and_models(models, device, dtype, problems)
    except ImportError as error:  # of a package that is too old for another
        problems.append(f"a package can't be imported: {str(error).splitlines()[0]} Mend the packages first; devices and models were not "
                        "looked at.")
        return report


def _hardware_and_models(models: Sequence[Path], device: str, dtype: str, problems: list[str]) -> dict[str, Any]:
    from ..pipelines.residency import free_memory
    from ..runtime import resolve_device, resolve_dtype

    chosen = resolve_device(device)
    precision = resolve_dtype(dtype, chosen)
    free = free_memory(chosen)
    named = os.environ.get(MODEL_VARIABLE, "")
    roots = [*models, *([Path(named)] if named not in ("", "nano") else []), Path()]  # nano is looked at anyway
    found = [_model(folder, precision, free) for folder in _model_folders(roots)]
    problems += [f"{root}: no such folder. Correct --models or {MODEL_VARIABLE}." for root in roots if not root.expanduser().is_dir()]
    problems += [model["error"] for model in found if model["error"]]
    return {
        "devices": _devices(),
        "chosen": {"device": str(chosen), "dtype": str(precision).removeprefix("torch."), "free_bytes": free},
        "disk": {str(root): shutil.disk_usage(root.expanduser()).free for root in roots if root.expanduser().is_dir()},
        "models": found,
    }


def as_text(report: dict[str, Any]) -> str:
    """What a person reads."""
    lines = [f"Python {report['python']} on {report['system']}", ""]
    for name, package in report["packages"].items():
        lines.append(f"{name:<18}{package['version'] or 'not installed':<16}{package['needs']}")
    lines.append("")
    for device in report["devices"]:
        lines.append(f"{device['name']}: {_memory(device['free_bytes'])} free of {_memory(device['total_bytes'])}")
    if report["chosen"]:
        lines.append(f"chosen: {report['chosen']['device']}, {report['chosen']['dtype']}")
    lines += [f"disk of {Path(root).absolute()}: {size(free)} free" for root, free in report["disk"].items()]
    for model in report["models"]:
        lines += ["", f"{model['path']}: {model['kind']}"]
        lines += [f"  {task:<18}{text}" for task, text in model["tasks"].items()]
    if not any(model["kind"] == "BLIP3-o model" and not model["packaged"] for model in report["models"]):
        lines += ["", "No published model was found here. blip3o download 4b gets one; nano, in this package, is used until then."]
    lines += ["", *(f"PROBLEM: {problem}" for problem in report["problems"])] if report["problems"] else ["", "No problems."]
    return "\n".join(lines)


def _packages() -> tuple[dict[str, dict[str, str | None]], list[str]]:
    """Needed packages with version and condition, and what is wrong with them. Optional ones are listed if they are installed."""
    from packaging.requirements import Requirement  # comes with transformers

    try:
        needed = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    except metadata.PackageNotFoundError:  # a clone in custom_nodes
        listed = Path(__file__).parents[2] / "requirements.txt"
        needed = [Requirement(line) for line in listed.read_text("utf-8").splitlines() if line.strip() and line[0] != "#"]
    packages: dict[str, dict[str, str | None]] = {}
    problems = []
    for requirement in needed:
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        if optional and (version is None or requirement.name == PACKAGE):
            continue
        packages[requirement.name] = {"version": version, "needs": str(requirement.specifier)}
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found = "is not installed" if version is None else f"{version} is installed"
            problems.append(f"{requirement.name} {found}, {requirement.specifier or 'any version'} is needed. Run: "
                            f'pip install "{requirement.name}{requirement.specifier}"')  # fmt: skip
    return packages, problems


def _devices() -> list[dict[str, Any]]:
    import torch

    from ..pipelines.residency import free_memory

    free, total = free_memory(torch.device("cpu")), _total_memory()
    cpu = {"name": f"CPU, {torch.get_num_threads()} threads", "free_bytes": free, "total_bytes": total}
    cuda = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        cuda.append({"name": f"cuda:{index}, {torch.cuda.get_device_name(index)}", "free_bytes": free, "total_bytes": total})
    return [*cuda, cpu]


def _total_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _model_folders(roots: Sequence[Path]) -> Iterator[Path]:
    """nano, and every folder with a config.json in one of `roots`."""
    from ..variants.blip3o import NANO_FOLDER

    yield NANO_FOLDER
    seen = {NANO_FOLDER.resolve()}
    for root in roots:
        level = [root.expanduser()]
        for _ in range(MAX_DEPTH + 1):
            for folder in level:
                if (folder / "config.json").is_file() and folder.resolve() not in seen:
                    seen.add(folder.resolve())
                    yield folder
            level = [child for parent in level for child in _subfolders(parent)]


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(child for child in folder.iterdir() if child.is_dir() and child.name[:1] != ".")
    except OSError:
        return []


def _model(folder: Path, dtype: Any, free: int | None) -> dict[str, Any]:
    """What a folder is, and how its tasks would run; other kinds of models are none of ours and no problem."""
    from ..pipelines.residency import choose, weight_bytes
    from ..variants import split
    from ..variants.blip3o import MODEL_TYPES, NANO_FOLDER, Blip3oCheckpoint, read_config
    from ..variants.sana_decoder import SanaDecoderCheckpoint, is_sana_decoder
    from ..variants.sdxl_decoder import SdxlDecoderCheckpoint, find_sdxl_decoder

    model: dict[str, Any] = {"path": str(folder), "kind": "another kind of model", "packaged": folder == NANO_FOLDER, "tasks": {}}
    model["error"] = None
    try:
        if is_sana_decoder(folder):
            model["kind"] = "SigLIP2 + SANA decoder"
            parts = SanaDecoderCheckpoint.open(folder).components
            stages = {"encoder": sum(weight_bytes(entries, dtype) for entries in parts.values())}
            model["tasks"] = {"reconstruction": _verdict(stages, choose(stages, free))}
            return model
        if not any(f'"{model_type}"' in (folder / "config.json").read_text("utf-8", errors="replace") for model_type in MODEL_TYPES):
            return model
        model["kind"] = "BLIP3-o model"
        if split.KEY in read_config(folder):
            model["kind"] = "BLIP3-o queries and DiT alone: use it with --qwen"
            return model
        parts = Blip3oCheckpoint.open(folder).components
        decoder = {} if find_sdxl_decoder(folder) is None else SdxlDecoderCheckpoint.open(find_sdxl_decoder(folder)).components
        nbytes = {name: weight_bytes(entries, dtype) for name, entries in parts.items()}
        language = nbytes.get("language_model", 0) + nbytes.get("queries", 0)
        needs = {
            "text to image": {"language": language, "embedding": nbytes.get("dit", 0)},
            "understanding": {"language": language + nbytes.get("vision_tower", 0) + nbytes.get("output_head", 0)},
            "reconstruction": {"encoder": nbytes.get("vision_encoder", 0)},
        }
        picture = sum(weight_bytes(entries, dtype) for entries in decoder.values())
        for task, stages in needs.items():
            if task != "understanding":
                stages["picture"] = picture
            lacking = [stage for stage, total in stages.items() if not total]
            model["tasks"][task] = f"lacks the weights of: {', '.join(lacking)}" if lacking else _verdict(stages, choose(stages, free))
    except Blip3oError as error:
        model["error"] = str(error)
        model["kind"] += ", broken"
    return model


def _verdict(stages: dict[str, int], offload: str) -> str:
    return f"{size(sum(stages.values()))} of weights, {size(max(stages.values()))} at once: {ADVICE[offload]}"


def _memory(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else size(nbytes)
