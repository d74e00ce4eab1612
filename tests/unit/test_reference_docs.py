"""docs/command_line.md and the reference in docs/python.md are what the code says.

`python -m tests.unit.test_reference_docs` writes both anew.
"""

import argparse
import ast
import inspect
import re
from pathlib import Path

import pytest

from blip3o_core.cli.main import SUBCOMMANDS, build_parser

DOCS = Path(__file__).parents[2] / "docs"
SOURCES = DOCS.parent / "blip3o_core"
REFERENCE = re.compile(r"(<!-- reference: .*? -->\n)(.*)(<!-- end of reference -->\n)", re.DOTALL)

PUBLIC = {
    "pipelines/blip3o.py": {"Blip3oPipeline": (
        "from_pretrained", "generate", "edit", "vary", "reconstruct", "ask", "chat", "encode_prompt", "sample_embeddings",
        "null_embedding", "sampled_negative", "embed_image", "zero_image_embedding", "embed_for_decoder", "decode_embeddings", "describe",
    )},
    "pipelines/chat.py": {"Chat": ("say", "to_json", "from_json")},
    "pipelines/edit.py": {"DrawingChat": ("draw",)},
    "embeddings.py": {"interpolate": (), "mix": (), "add_difference": ()},
    "preview.py": {"principal_component_map": ()},
    "variants/blip3o.py": {"Blip3oCheckpoint": ("open", "load_backbone", "load_vision_tower", "load_output_head", "load_dit")},
    "variants/sdxl_decoder.py": {"SdxlDecoderCheckpoint": ("open",)},
    "variants/sana_decoder.py": {"SanaDecoderCheckpoint": ("open",)},
    "errors.py": {"Blip3oError": (), "CheckpointError": (), "InputError": (), "OutputError": (), "ConfigError": (), "DataError": (),
                  "TrainingError": (), "DownloadError": ()},
}  # fmt: skip
"""File of blip3o_core -> name -> its methods."""


def command_line() -> str:
    """The whole of docs/command_line.md."""
    parser = build_parser()
    index = "".join(f"| [{name}](#blip3o-{name}) | {summary(module)} |\n" for name, module in SUBCOMMANDS.items())
    parts = ["# The command line\n", f"{parser.description}\n",
             "Written from the parser by `python -m tests.unit.test_reference_docs`; `blip3o COMMAND --help` says the same.\n",
             "| command | |\n|---|---|\n" + index]  # fmt: skip
    for name, command in subcommands(parser).items():
        parts += [f"## blip3o {name}\n", *described(command)]
        for inner, nested in subcommands(command).items():
            parts += [f"### blip3o {name} {inner}\n", *described(nested)]
    return "\n".join(parts)


def summary(module: object) -> str:
    return cell(str(module.__doc__).splitlines()[0])


def subcommands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return {name: command for action in parser._actions if isinstance(action, argparse._SubParsersAction)
            for name, command in action.choices.items()}  # fmt: skip


def described(command: argparse.ArgumentParser) -> list[str]:
    """Description, table of arguments and examples."""
    rows = [(argument, command._get_formatter()) for argument in command._actions if not isinstance(argument, argparse._SubParsersAction)]
    lines = [f"| {shown(argument)} | {cell(formatter._expand_help(argument) if argument.help else '')} |" for argument, formatter in rows
             if "--help" not in argument.option_strings and argument.help != argparse.SUPPRESS]  # fmt: skip
    table = "| | |\n|---|---|\n" + "\n".join(lines) + "\n" if lines else ""
    examples = f"```text\n{command.epilog.strip()}\n```\n" if command.epilog else ""
    return [part for part in (f"{command.description}\n" if command.description else "", table, examples) if part]


def shown(argument: argparse.Action) -> str:
    """`--output PATH`"""
    flags = ", ".join(argument.option_strings) or str(argument.metavar or argument.dest)
    named = " ".join(argument.metavar) if isinstance(argument.metavar, tuple) else argument.metavar
    choices = "{" + ",".join(map(str, argument.choices)) + "}" if argument.choices else argument.dest.upper()
    value = "" if argument.nargs == 0 or not argument.option_strings else f" {named or choices}"
    return f"`{flags}{value}`".replace("|", r"\|")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def python_reference() -> str:
    """What stands between the marks of docs/python.md."""
    parts = []
    for file, names in PUBLIC.items():
        module = "blip3o_core." + file.removesuffix(".py").replace("/", ".")
        tree = ast.parse((SOURCES / file).read_text("utf-8"))
        found = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        for name, methods in names.items():
            node = found[name]
            parts.append(f"### `{module}.{name}`\n")
            if isinstance(node, ast.FunctionDef):
                parts.append(f"```python\n{signature(node)}\n```\n")
            parts.append(documentation(node))
            inner = {child.name: child for child in node.body if isinstance(child, ast.FunctionDef)}
            for method in methods:
                parts += [f"#### `{name}.{method}`\n", f"```python\n{signature(inner[method])}\n```\n", documentation(inner[method])]
    return "\n" + "\n".join(parts) + "\n"


def signature(node: ast.FunctionDef) -> str:
    """name(a: int, b: str = "x") -> Tensor, over several lines if it is long."""
    arguments = ast.unparse(node.args)
    arguments = re.sub(r"^(self|cls)(, )?", "", arguments)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"{node.name}({arguments}){returns}"
    if len(line) <= 120:
        return line
    pieces, depth = [""], 0
    for character in arguments:
        depth += character in "([{"
        depth -= character in ")]}"
        if character == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += character
    pieces = [re.sub(r"^(\s*\w+: .*?)=(?=[^=]*$)", r"\1 = ", piece) for piece in pieces]
    return f"{node.name}(\n" + "".join(f"    {piece.strip()},\n" for piece in pieces) + f"){returns}"


def documentation(node: ast.ClassDef | ast.FunctionDef) -> str:
    text = ast.get_docstring(node)
    assert text, f"{node.name} has no docstring"
    return f"```text\n{inspect.cleandoc(text)}\n```\n"


def test_the_command_line_is_that_of_the_parser() -> None:
    assert (DOCS / "command_line.md").read_text("utf-8") == command_line(), "python -m tests.unit.test_reference_docs writes it anew"


def test_the_python_reference_is_that_of_the_docstrings() -> None:
    found = REFERENCE.search((DOCS / "python.md").read_text("utf-8"))
    assert found and found[2] == python_reference(), "python -m tests.unit.test_reference_docs writes it anew"


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_command_shows_an_example(name: str) -> None:
    assert f"blip3o {name}" in (subcommands(build_parser())[name].epilog or "")


def write() -> None:
    (DOCS / "command_line.md").write_text(command_line(), "utf-8")
    page = DOCS / "python.md"
    page.write_text(REFERENCE.sub(lambda found: found[1] + python_reference() + found[3], page.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    write()
