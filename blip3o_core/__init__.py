"""BLIP3-o without a host: models, checkpoints, pipelines, command line. Imports no comfy, and nothing heavy until used."""

from typing import TYPE_CHECKING

from .errors import Blip3oError, CheckpointError, InputError, OutputError

if TYPE_CHECKING:
    from .pipelines.blip3o import Blip3oPipeline

__version__ = "0.1.0"
__all__ = ["Blip3oError", "Blip3oPipeline", "CheckpointError", "InputError", "OutputError", "__version__"]


def __getattr__(name: str):
    if name == "Blip3oPipeline":  # torch loads here, so that `blip3o --help` answers at once
        from .pipelines.blip3o import Blip3oPipeline

        return Blip3oPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
