"""Every node has a help page whose tables say what the node's schema says. Read from source, without a host."""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[2]
PAGES = REPOSITORY / "web" / "docs"
LIMITS = ("default", "min", "max")


class NodeSchema(NamedTuple):
    """What the page of a node has to tell."""

    node_id: str
    display_name: str
    inputs: dict[str, dict[str, object]]  # name -> its literal keyword arguments
    outputs: list[str]


def read_schemas() -> list[NodeSchema]:
    """The io.Schema(...) of each class in nodes/*.py."""
    modules = [ast.parse(file.read_text("utf-8")) for file in sorted((REPOSITORY / "nodes").glob("*.py"))]
    return [read_schema({keyword.arg: keyword.value for keyword in call.keywords}, module) for module in modules
            for call in ast.walk(module) if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema"]  # fmt: skip


def read_schema(arguments: dict[str | None, ast.expr], module: ast.Module) -> NodeSchema:
    return NodeSchema(
        node_id=ast.literal_eval(arguments["node_id"]),
        display_name=ast.literal_eval(arguments["display_name"]),
        inputs={ast.literal_eval(call.args[0]): literals(call) for call in elements(arguments["inputs"], module)},
        outputs=[str(literals(call)["display_name"]) for call in elements(arguments["outputs"], module)],
    )


def elements(value: ast.expr | None, module: ast.Module) -> list[ast.Call]:
    """The entries of `inputs` and `outputs`: calls, written out or returned by a function of the module (`*shared()`)."""
    assert isinstance(value, ast.List), value and ast.unparse(value)
    found = []
    for entry in value.elts:
        if isinstance(entry, ast.Starred):
            call = ast.unparse(entry.value)
            [function] = [node for node in module.body if isinstance(node, ast.FunctionDef) and f"{node.name}()" == call]
            [result] = [node for node in function.body if isinstance(node, ast.Return)]
            found += elements(result.value, module)
        else:
            assert isinstance(entry, ast.Call), ast.unparse(entry)
            found.append(entry)
    return found


def literals(call: ast.Call) -> dict[str, object]:
    """Keyword arguments that are written as plain values; named constants are left out."""
    return {keyword.arg: keyword.value.value for keyword in call.keywords
            if keyword.arg and isinstance(keyword.value, ast.Constant)}  # fmt: skip


def table(page: str, heading: str) -> dict[str, str]:
    """Name -> whole row, of the table under a heading."""
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return {match[1]: match[0] for match in re.finditer(r"^\| `(\w+)`.*$", section, re.MULTILINE)}


def shown(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


SCHEMAS = read_schemas()
each_node = pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.node_id)


def read_page(schema: NodeSchema) -> str:
    return (PAGES / f"{schema.node_id}.md").read_text("utf-8")


def test_every_node_has_a_page_and_every_page_a_node() -> None:
    assert SCHEMAS
    assert {page.stem for page in PAGES.glob("*.md")} == {schema.node_id for schema in SCHEMAS}


@each_node
def test_the_page_begins_with_the_name_that_the_node_shows(schema: NodeSchema) -> None:
    assert read_page(schema).startswith(f"# {schema.display_name}\n")


@each_node
def test_the_page_lists_the_inputs_and_outputs_of_the_node(schema: NodeSchema) -> None:
    page = read_page(schema)
    assert list(table(page, "Inputs")) == list(schema.inputs)
    assert list(table(page, "Outputs")) == schema.outputs


@each_node
def test_the_page_gives_defaults_and_ranges_as_the_code_does(schema: NodeSchema) -> None:
    rows = table(read_page(schema), "Inputs")
    for name, arguments in schema.inputs.items():
        cells = [cell.strip() for cell in rows[name].split("|")]
        expected = {limit: shown(arguments[limit]) for limit in LIMITS if limit in arguments}
        if "default" in expected:
            assert cells[3] == expected["default"], name
        if "min" in expected and "max" in expected:
            assert cells[4] == f"{expected['min']} to {expected['max']}", name
        for word in ("optional", "advanced"):
            assert (f"({word})" in cells[1]) == bool(arguments.get(word)), f"{name}: {word}"
