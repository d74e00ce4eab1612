"""Tokenizer files, looked at before a library reads them."""

from pathlib import Path

from ..errors import CheckpointError
from .json_files import read_table

MOST_TOKENS = 10_000_000


def require_sensible_ids(folder: Path) -> None:
    """Raises CheckpointError for ids that make the tokenizers library end the process: it makes room for all up to the largest."""
    for file in (folder / "vocab.json", folder / "tokenizer.json"):
        table = read_table(file) if file.is_file() else {}
        model = table.get("model", {}) if file.name == "tokenizer.json" else {"vocab": table}
        vocabulary = model.get("vocab", {}) if isinstance(model, dict) else {}
        for token, token_id in vocabulary.items() if isinstance(vocabulary, dict) else ():
            if not isinstance(token_id, int) or not 0 <= token_id < MOST_TOKENS:
                raise CheckpointError(f"{file}: the id of the token {token!r:.40} is {token_id!r:.40}, not a number below {MOST_TOKENS:,}. "
                                      "Download the tokenizer files again.")
