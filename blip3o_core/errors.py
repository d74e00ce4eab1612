"""What a user can mend. Every message names the value, the file and the fix."""


class Blip3oError(Exception):
    """Base of all errors that this package raises on purpose."""


class CheckpointError(Blip3oError):
    """A file or folder of weights is missing, damaged, of another architecture or does not fit its configuration."""


class InputError(Blip3oError, ValueError):
    """A prompt, seed, size, step count or tensor that the models can't work with."""


class OutputError(Blip3oError):
    """A result can't be written where it was asked for."""
