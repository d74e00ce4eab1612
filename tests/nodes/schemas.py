"""What the nodes say of themselves, read from source, without a host.

`python -m tests.nodes.schemas` writes locales/en/nodeDefs.json, which the other languages follow.
"""

import ast
import json
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parents[2]
LOCALES = REPOSITORY / "locales"


class NodeSchema(NamedTuple):
    """Literal keyword arguments; named constants are left out."""

    node_id: str
    display_name: str
    category: str
    description: str
    inputs: dict[str, dict[str, Any]]  # name -> arguments
    outputs: list[dict[str, Any]]


def read_schemas() -> list[NodeSchema]:
    """The io.Schema(...) of each class in nodes/*.py."""
    modules = [ast.parse(file.read_text("utf-8")) for file in sorted((REPOSITORY / "nodes").glob("*.py"))]
    return [read_schema(call, module) for module in modules
            for call in ast.walk(module) if isinstance(call, ast.Call) and ast.unparse(call.func) == "io.Schema"]  # fmt: skip


def read_schema(schema: ast.Call, module: ast.Module) -> NodeSchema:
    arguments = {keyword.arg: keyword.value for keyword in schema.keywords}
    told = literals(schema)
    return NodeSchema(
        *(str(told[name]) for name in ("node_id", "display_name", "category", "description")),
        inputs={ast.literal_eval(call.args[0]): literals(call) for call in elements(arguments["inputs"], module)},
        outputs=[literals(call) for call in elements(arguments["outputs"], module)],
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


def literals(call: ast.Call) -> dict[str, Any]:
    return {keyword.arg: keyword.value.value for keyword in call.keywords
            if keyword.arg and isinstance(keyword.value, ast.Constant)}  # fmt: skip


def english(schema: NodeSchema) -> dict[str, Any]:
    """The node's entry in nodeDefs.json."""

    def entry(name: str, arguments: dict[str, Any]) -> dict[str, str]:
        return {"name": name} | ({"tooltip": arguments["tooltip"]} if "tooltip" in arguments else {})

    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {name: entry(name, arguments) for name, arguments in schema.inputs.items()},
        "outputs": {str(slot): entry(arguments["display_name"], arguments) for slot, arguments in enumerate(schema.outputs)},
    }


def english_categories() -> dict[str, str]:
    """Parts of the menu that ComfyUI has no translation of, or that are ours."""
    parts = {part for schema in read_schemas() for part in schema.category.split("/")}
    return {part: part for part in sorted(parts - {"BLIP3-o"})}


def write_english() -> None:
    folder = LOCALES / "en"
    folder.mkdir(parents=True, exist_ok=True)
    definitions = {schema.node_id: english(schema) for schema in sorted(read_schemas())}
    for name, content in (("nodeDefs", definitions), ("main", {"nodeCategories": english_categories()})):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    write_english()
