"""Print what makes a shell complete commands and options of blip3o."""

import argparse

SHELLS = ("bash", "zsh", "tcsh")

EXAMPLES = """examples:
  blip3o completion bash > ~/.local/share/bash-completion/completions/blip3o
  blip3o completion zsh > ~/.zsh/completions/_blip3o  # a folder of $fpath

Then open a new shell. Needs the package shtab: pip install "comfyui-blip3o[completion]".
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=SHELLS, help="the shell that shall complete")


def run(args: argparse.Namespace) -> None:
    """Raises InputError if shtab is not installed."""
    from ..runtime import require_package
    from .main import build_parser

    shtab = require_package("shtab", extra="completion", purpose="completion")
    print(shtab.complete(build_parser(), args.shell))
