"""The section "In a graph" of each help page: where the node stands in a shipped workflow.

`python -m tests.nodes.help_graphs` writes them.
"""

import json
import re
from typing import Any

from .schemas import REPOSITORY, NodeSchema, read_schemas

PAGES = REPOSITORY / "web" / "docs"
SECTION = re.compile(r"## In a graph\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
ORDER = ("text_to_image", "image_editing", "image_understanding", "multi_turn_chat", "reconstruction", "variations_and_mixing",
         "text_to_image_lora", "reconstruction_sana", "iterative_editing")  # fmt: skip
"""Of the workflows, the plain ones first."""


def workflow_of(node_id: str) -> str:
    """The first shipped workflow with such a node."""
    return next(name for name in ORDER if any(node["type"] == node_id for node in read(name)["nodes"]))


def read(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text("utf-8"))


def section(schema: NodeSchema) -> str:
    """A picture of the node and its links."""
    name = workflow_of(schema.node_id)
    workflow = read(name)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    node = next(node for node in workflow["nodes"] if node["type"] == schema.node_id)
    into, out = [], []
    for _, source, source_slot, target, target_slot, _ in workflow["links"]:
        output, entry = nodes[source]["outputs"][source_slot]["name"], nodes[target]["inputs"][target_slot]["name"]
        if target == node["id"]:
            into.append(f"{title(nodes[source])} [{output}] -> {entry}")
        if source == node["id"]:
            out.append(f"{output} -> {title(nodes[target])} [{entry}]")
    links = "\n".join(into + out)
    return f"## In a graph\n\n![{schema.display_name}]({schema.node_id}.jpg)\n\nIn the workflow *{name}*:\n\n```\n{links}\n```\n\n"


def title(node: dict[str, Any]) -> str:
    """What is written on it."""
    names = {schema.node_id: schema.display_name for schema in read_schemas()}
    return node.get("title") or names.get(node["type"], node["type"])


def with_section(page: str, schema: NodeSchema) -> str:
    """The page, with the section before the common mistakes."""
    without = SECTION.sub("", page)
    head, heading, tail = without.partition("## Common mistakes")
    return f"{head}{section(schema)}{heading}{tail}" if heading else f"{head.rstrip()}\n\n{section(schema).rstrip()}\n"


def main() -> None:
    for schema in read_schemas():
        file = PAGES / f"{schema.node_id}.md"
        file.write_text(with_section(file.read_text("utf-8"), schema), "utf-8")


if __name__ == "__main__":
    main()
