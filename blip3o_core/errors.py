"""What a user can mend. Every message names the value, the file and the fix."""

import errno
import re

LONGEST = 4000  # letters of a message, a screen
LONGEST_WORD = 600
# what would act on a terminal, or turn around what stands there; lone surrogates can't be printed at all
_UNREADABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class Blip3oError(Exception):
    """Base of all errors that this package raises on purpose. What a message quotes of a file is readable text, whatever the file holds."""

    def __init__(self, message: str = "") -> None:
        super().__init__(readable(message, LONGEST))


class CheckpointError(Blip3oError):
    """A file or folder of weights is missing, damaged, of another architecture or does not fit its configuration."""


class InputError(Blip3oError, ValueError):
    """A prompt, seed, size, step count or tensor that the models can't work with."""


class OutputError(Blip3oError):
    """A result can't be written where it was asked for."""


class ConfigError(InputError):
    """A training configuration with an unknown key, a wrong type or values that contradict each other."""


class DataError(InputError):
    """A dataset that is empty, damaged beyond its limit, or not in the layout it is said to have."""


class TrainingError(Blip3oError):
    """Training can't go on or can't be resumed; what was saved before is intact."""


class DownloadError(Blip3oError):
    """A file can't be had from the hub, or is not what the hub says it is; what was received before is kept."""


def name_too_long(error: OSError) -> str | None:
    """What to say of a name that no file system takes, which every look at a file may raise; None for another error."""
    if error.errno != errno.ENAMETOOLONG:
        return None
    return f"{readable(str(error.filename), LONGEST_WORD)}: no file or folder can have so long a name. Check the path."


def readable(text: str, longest: int | None = None) -> str:
    """`text` with control characters shown as escapes. `longest`: of words and the whole, whatever is longer is without its middle."""
    if longest is not None:
        text = _without_middle(re.sub(rf"\S{{{LONGEST_WORD},}}", lambda word: _without_middle(word[0], LONGEST_WORD), text), longest)
    return _UNREADABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _without_middle(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-(longest // 2) :]}"
