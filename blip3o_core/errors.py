"""What a user can mend. Every message names the value, the file and the fix."""


class Blip3oError(Exception):
    """Base of all errors that this package raises on purpose."""


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
