"""README promises commands: CI runs exactly these, and what they name exists."""

import re
from pathlib import Path

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
    sources = "".join(file.read_text("utf-8") for file in (REPOSITORY / "nodes").glob("*.py"))
    names = re.findall(r'display_name="([^"]*BLIP3-o[^"]*)"', sources)
    assert len(names) >= 6
    for name in names:
        assert f"| {name} |" in README, f"{name} is not in the node table"


def test_options_that_the_readme_uses_exist():
    help_source = "".join(file.read_text("utf-8") for file in sorted((REPOSITORY / "blip3o_core" / "cli").glob("*.py")))
    for option in set(re.findall(r"(?<=\s)--[a-z-]+", "".join(re.findall(r"blip3o .*", README)))):
        assert f'"{option}"' in help_source or option == "--help", option
