"""docs/training.md: its tables are those of the code, its configurations are accepted, its commands parse.

`python tests/unit/test_training_docs.py` writes the table of options anew.
"""

import argparse
import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import yaml

from blip3o_core.cli.main import build_parser
from blip3o_core.cli.train import parse
from blip3o_core.train import command
from blip3o_core.train.config import RESUMABLE, TrainConfig, load_config
from blip3o_core.train.options import known_keys, option_tables

FILE = Path(__file__).parents[2] / "docs" / "training.md"
README = FILE.parents[1] / "README.md"
OPTIONS = re.compile(r"(<!-- options: .*? -->\n)(.*)(<!-- end of options -->\n)", re.DOTALL)


def text() -> str:
    return FILE.read_text("utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks without the indentation of the list they stand in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text(), re.DOTALL | re.MULTILINE)
    return [re.sub(rf"^{indent}", "", block, flags=re.MULTILINE) for indent, block in found]


def commands() -> list[list[str]]:
    """`blip3o` and trainer commands of bash blocks and of inline code, as words."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines() + re.findall(r"`(blip3o [^`]*|python -m blip3o[^`]*)`", text())
    found = [shlex.split(line.split("-c '")[-1].rstrip("'"), comments=True) for line in lines]
    return [words[index:] for words in found if words for index in [start_of(words)] if index is not None]


def start_of(words: list[str]) -> int | None:
    if words[0] == "blip3o":
        return 0
    return words.index("blip3o_core.train") if "blip3o_core.train" in words else None


def test_the_table_of_options_is_that_of_the_dataclasses():
    assert OPTIONS.search(text())[2] == option_tables(TrainConfig), f"run python {Path(__file__).name} to write it anew"


@pytest.mark.parametrize("block", blocks("toml"))
def test_every_configuration_is_accepted(block, tmp_path):
    file = tmp_path / "docs.toml"
    file.write_text(block, "utf-8")
    assert load_config(file) != load_config(None)


def test_there_are_as_many_examples_as_promised():
    assert len(blocks("toml")) >= 8 and len(commands()) >= 15 and len(blocks("yaml")) == 2


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_parses(words):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            if words[0] == "blip3o":
                args = parse(build_parser(), words[1:])
            else:
                parser = argparse.ArgumentParser()
                command.add_arguments(parser)
                args = parse(parser, words[1:])
        except SystemExit:
            pytest.fail(err.getvalue())
    if words[0] != "blip3o" or words[1] == "train":
        load_config(None, args.overrides)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_accelerate_takes_its_files(block, tmp_path):
    config_args = pytest.importorskip("accelerate.commands.config.config_args")
    file = tmp_path / "accelerate.yaml"
    file.write_text(block)
    assert config_args.load_config_from_file(str(file)).num_processes == yaml.safe_load(block)["num_processes"] == 8


def test_keys_named_in_the_text_exist():
    known = {f"{section}.{key}" for section, key in known_keys(TrainConfig)}
    sections = {name.partition(".")[0] for name in known}
    named = re.findall(r"`([a-z]+(?:\.0)?\.[a-z_0-9]+)(?:=[^`]*| = [^`]*)?`", text())
    named = [name for name in named if name.partition(".")[0] in sections and not name.endswith((".jsonl", ".toml", ".json"))]
    assert len(named) > 15
    for name in named:
        assert name in known or name.replace("data.", "data.0.") in known, name


def test_keys_that_may_change_on_resume_are_the_ones_named():
    paragraph = re.search(r"These may change: (.*?)\.\n", text(), re.DOTALL)[1]
    for key in RESUMABLE:
        if key.startswith("model."):
            assert "the paths of the model" in paragraph
        elif key != "cache.folder":
            assert f"`{key}`" in paragraph or f"`[{key}]`" in paragraph, key


def test_links_lead_somewhere():
    heads = {re.sub(r"[^a-z0-9 -]", "", head.lower()).replace(" ", "-") for head in re.findall(r"^#+ (.*)$", text(), re.MULTILINE)}
    for link in re.findall(r"\]\(#([^)]*)\)", text()):
        assert link in heads, link
    assert "(docs/training.md)" in README.read_text("utf-8")


if __name__ == "__main__":
    FILE.write_text(OPTIONS.sub(lambda found: found[1] + option_tables(TrainConfig) + found[3], text()), "utf-8")
