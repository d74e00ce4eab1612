"""The arrows of the architecture: nodes -> adapters -> blip3o_core, and inside the core only the listed ones."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HOST_MODULES = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server"}
EVERYBODY = {"errors", "runtime", "files", ""}  # "" is the package root: __version__
ALLOWED = {
    "errors": set(),
    "presets": set(),
    "runtime": set(),
    "files": set(),
    "prompts": set(),
    "preview": set(),
    "images": set(),
    "embeddings": set(),
    "sheets": set(),
    "": {"pipelines"},
    "checkpoint": set(),
    "models": {"sampling", "checkpoint"},
    "sampling": set(),
    "variants": {"models", "checkpoint", "prompts", "sampling"},
    "hub": {"variants"},
    "lora": {"models", "checkpoint", "variants"},
    "shapes": {"presets"},
    "evaluate": {"pipelines", "shapes", "images", "sheets"},
    "bench": {"pipelines", "models", "sampling"},
    "nano": {"evaluate", "pipelines", "models", "checkpoint", "variants", "prompts", "presets", "sampling", "shapes", "train"},
    "data": {"prompts", "images", "models"},
    "pipelines": {"variants", "sampling", "models", "checkpoint", "prompts", "images", "lora"},
    "train": {"sheets", "data", "lora", "pipelines", "variants", "sampling", "models", "checkpoint", "prompts", "images"},
    "cli": {"pipelines", "checkpoint", "variants", "images", "presets", "lora", "train", "evaluate", "nano", "bench", "hub"},
}


def imports(file: Path) -> list[tuple[int, str]]:
    """(level, module) of every import in a file, wherever it stands; a relative `from . import x` gives x."""
    found = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.level, node.module)] if node.module else [(node.level, alias.name) for alias in node.names]
    return found


def core_files() -> list[Path]:
    return sorted((REPOSITORY / "blip3o_core").rglob("*.py"))


@pytest.mark.parametrize("file", core_files(), ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_core_imports_follow_the_arrows_and_no_host(file):
    inside = file.relative_to(REPOSITORY / "blip3o_core").with_suffix("").parts
    part = inside[0] if len(inside) > 1 else inside[0].replace("__init__", "")
    for level, module in imports(file):
        if level == 0:
            assert module.split(".")[0] not in HOST_MODULES, f"{file} imports {module} of the host"
            continue
        assert level <= len(inside), f"{file} reaches out of the package"
        target = [*inside[: len(inside) - level], *module.split(".")]
        target_part = target[0] if target[0] in ALLOWED else ""
        assert target_part == part or target_part in ALLOWED[part] | EVERYBODY, f"{file} must not import {'.'.join(target)}"


@pytest.mark.parametrize("file", sorted((REPOSITORY / "nodes").glob("*.py")), ids=lambda file: file.name)
def test_nodes_touch_the_host_only_through_its_versioned_api_and_the_adapters(file):
    for level, module in imports(file):
        if level == 0:
            assert module.split(".")[0] not in HOST_MODULES - {"comfy_api"}, f"{file} imports {module}"
            assert not module.startswith("comfy_api.") or module == "comfy_api.v0_0_2", f"{file} imports {module}"


@pytest.mark.parametrize("file", sorted((REPOSITORY / "nodes" / "adapters").glob("*.py")), ids=lambda file: file.name)
def test_adapters_import_no_node(file):
    own = {path.stem for path in (REPOSITORY / "nodes").glob("*.py")} - {"__init__"}
    assert not [module for level, module in imports(file) if level == 2 and module.split(".")[0] in own]


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, blip3o_core, blip3o_core.cli.main; print([m for m in ('torch', 'transformers', 'diffusers') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert result.stdout.strip() == "[]"
