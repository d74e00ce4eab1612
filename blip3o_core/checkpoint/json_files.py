"""JSON files of a checkpoint: configurations and indices of shards."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

MAX_BYTES = 100_000_000  # as of the header of a safetensors file


def read_table(file: Path) -> dict[str, Any]:
    """Names and values of a JSON file. Raises CheckpointError if it is missing, damaged, or holds anything but a table."""
    try:
        if not file.is_file():  # a pipe or a device would be waited for
            raise CheckpointError(f"{file}: missing. Download it from the repository of the other files.")
        if os.stat(file).st_size > MAX_BYTES:
            raise CheckpointError(f"{file}: larger than any configuration ({os.stat(file).st_size} bytes). Download it again.")
        table = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of thousands of digits
        raise CheckpointError(f"{file}: not readable as JSON ({error}). Download it again.") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{file}: not readable as JSON: holds no table of settings but a {type(table).__name__}. Download it again.")
    return table
