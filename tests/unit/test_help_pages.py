"""Every node has a help page whose tables say what the node's schema says. Read from source, without a host."""

import re

import pytest
from PIL import Image

from ..nodes.help_graphs import section
from ..nodes.schemas import REPOSITORY, NodeSchema, read_schemas

PAGES = REPOSITORY / "web" / "docs"
LIMITS = ("default", "min", "max")


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
    for kind in ("md", "jpg"):
        assert {page.stem for page in PAGES.glob(f"*.{kind}")} == {schema.node_id for schema in SCHEMAS}


@each_node
def test_the_page_begins_with_the_name_that_the_node_shows(schema: NodeSchema) -> None:
    assert read_page(schema).startswith(f"# {schema.display_name}\n")


@each_node
def test_the_page_lists_the_inputs_and_outputs_of_the_node(schema: NodeSchema) -> None:
    page = read_page(schema)
    assert list(table(page, "Inputs")) == list(schema.inputs)
    assert list(table(page, "Outputs")) == [output["display_name"] for output in schema.outputs]


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


@each_node
def test_the_page_shows_the_node_and_where_it_stands_in_a_shipped_workflow(schema: NodeSchema) -> None:
    """Otherwise: python -m tests.nodes.help_graphs, and python -m tests.browser.node_pictures for the pictures."""
    assert section(schema).strip() in read_page(schema)
    with Image.open(PAGES / f"{schema.node_id}.jpg") as picture:
        assert picture.width > 200
