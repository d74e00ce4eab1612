"""What installers read must agree: pyproject.toml, requirements.txt, the tested floors, the pack's metadata."""

import ast
import re
import sys
from pathlib import Path

import pytest

import blip3o_core

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no tomllib; pyproject.toml is read on newer versions")

REPOSITORY = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))


def lines(file: str) -> list[str]:
    return [line for line in (REPOSITORY / file).read_text("utf-8").splitlines() if line and not line.startswith("#")]


def test_requirements_equal_the_dependencies_of_pyproject():
    assert lines("requirements.txt") == PYPROJECT["project"]["dependencies"]


def test_torch_is_not_pinned_and_nothing_comes_from_git():
    assert "torch" in lines("requirements.txt")
    assert not any("git+" in line or "@" in line for line in lines("requirements.txt"))


def test_every_floor_is_a_version_that_the_floor_environment_tests():
    pins = [line.partition(";")[0].strip().split("==") for line in lines("tests/server/floor-constraints.txt")]
    tested = dict(reversed(pins))  # the first line of a package counts: the others are for newer Pythons
    promised = [*lines("requirements.txt"), *PYPROJECT["project"]["optional-dependencies"]["train"]]
    floors = dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in promised if line != "torch")
    for name, floor in floors.items():
        assert tested[name].split(".")[:2] == floor.split(".")[:2], f"{name}: {floor} is promised, {tested[name]} is tested"


def test_versions_agree():
    assert PYPROJECT["project"]["version"] == blip3o_core.__version__


def test_registry_metadata():
    assert "comfyui" not in PYPROJECT["tool"]["comfy"]["DisplayName"].lower()
    assert re.fullmatch(r">=\d+\.\d+\.\d+", PYPROJECT["tool"]["comfy"]["requires-comfyui"])
    assert "web" not in PYPROJECT["tool"]["comfy"]


def test_nodes_have_the_shape_that_the_manager_scans_for():
    listed = (REPOSITORY / "nodes" / "__init__.py").read_text("utf-8")
    classes = [node for file in sorted((REPOSITORY / "nodes").glob("*.py")) for node in ast.parse(file.read_text("utf-8")).body
               if isinstance(node, ast.ClassDef) and any(ast.unparse(base) == "io.ComfyNode" for base in node.bases)]  # fmt: skip
    assert len(classes) >= 6
    for node in classes:
        ids = [keyword.value.value for call in ast.walk(node) if isinstance(call, ast.Call)
               for keyword in call.keywords if keyword.arg == "node_id" and isinstance(keyword.value, ast.Constant)]  # fmt: skip
        assert ids == [node.name], f"{node.name}: node_id must be the literal class name"
        assert node.name.startswith("Blip3o")
        assert re.search(rf"\b{node.name},", listed), f"{node.name} is not in the list of nodes/__init__.py"


def test_every_input_and_output_of_every_node_has_a_tooltip():
    for file in sorted((REPOSITORY / "nodes").glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in ("Input", "Output"):
                assert "tooltip" in {keyword.arg for keyword in call.keywords}, f"{file.name}:{call.lineno} has no tooltip"


SOCKETS = ("inputs", "outputs")


def test_every_node_is_found_by_other_names_and_in_the_menu_of_the_pack():
    for file in sorted((REPOSITORY / "nodes").glob("*.py")):
        for call in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema":
                told = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg not in SOCKETS}
                assert told["category"].startswith("BLIP3-o/") and told["description"], told["node_id"]
                assert len(told["search_aliases"]) >= 2 and any("BLIP3o" in alias for alias in told["search_aliases"]), told["node_id"]
