"""README promises commands: CI runs exactly these, and what they name exists."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
README = (REPOSITORY / "README.md").read_text("utf-8")


def test_ci_runs_the_two_commands_of_the_readme():
    commands = [block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "pip install" in block]
    assert len(commands) == 2
    ci = (REPOSITORY / ".ci" / "run").read_text("utf-8")
    ci = ci.replace('"$work/circle.png"', "circle.png").replace("pip install -q", "pip install")
    for command in commands:
        assert command in ci, command


def test_files_and_nodes_that_the_readme_names_exist():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README) + re.findall(r"`((?:workflows|tests|docs|nodes|blip3o_core)/[^`*]*)`", README):
        assert (REPOSITORY / path).exists(), path
    nodes = (REPOSITORY / "docs" / "nodes.md").read_text("utf-8")
    sources = "".join(file.read_text("utf-8") for file in (REPOSITORY / "nodes").glob("*.py"))
    names = re.findall(r'display_name="([^"]*BLIP3-o[^"]*)"', sources)
    assert len(names) >= 6
    for name in names:
        assert f"| [{name}](" in nodes, f"{name} is not in the table of docs/nodes.md"


@pytest.mark.parametrize("page", sorted((REPOSITORY / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_pages_are_linked_and_link_to_what_exists(page: Path):
    text = page.read_text("utf-8")
    for path in re.findall(r"\]\(((?!http|#)[^)#]+)", text):
        assert (page.parent / path).exists(), path
    pages = [README, *(other.read_text("utf-8") for other in page.parent.glob("*.md") if other != page)]
    assert any(f"{page.name})" in other for other in pages), f"nothing links to {page.name}"


def test_options_that_the_readme_uses_exist():
    help_source = "".join(file.read_text("utf-8") for file in sorted((REPOSITORY / "blip3o_core" / "cli").glob("*.py")))
    for option in set(re.findall(r"(?<=\s)--[a-z-]+", "".join(re.findall(r"blip3o .*", README)))):
        assert f'"{option}"' in help_source or option == "--help", option
