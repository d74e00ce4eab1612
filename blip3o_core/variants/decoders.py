"""Which decoder a folder holds."""

import os
from pathlib import Path

from ..errors import InputError
from .sana_decoder import SanaDecoderCheckpoint, is_sana_decoder
from .sdxl_decoder import SdxlDecoderCheckpoint

DecoderCheckpoint = SdxlDecoderCheckpoint | SanaDecoderCheckpoint


def open_decoder(folder: str | Path, *, positions: str | None = None, scheduler: str | None = None) -> DecoderCheckpoint:
    """A SigLIP2 + SANA decoder if config.json says so, else an SDXL decoder.

    scheduler: None takes that of the reference. positions: a switch of SANA decoders. Raises CheckpointError if it is neither, InputError
    for a switch or value that it doesn't have.
    """
    if is_sana_decoder(Path(os.path.expanduser(folder))):
        return SanaDecoderCheckpoint.open(folder, positions=positions, scheduler=scheduler)
    if positions is not None:
        raise InputError(f"{folder}: no SANA decoder, so it has no choice of positions. Leave them out, or give SigLIP2_SANA.")
    return SdxlDecoderCheckpoint.open(folder, scheduler=scheduler)
