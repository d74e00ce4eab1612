"""When memory runs out: what needed it and what takes less, as the host's own kind of error, which makes it unload its models."""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.model_management as model_management

from ...blip3o_core.runtime import first_line, is_out_of_memory

CLOSE_OTHERS = "Close other programs."
FEWER_BITS = "Or use a checkpoint in 8 or 4 bits (blip3o quantize)."
LESS_MEMORY = "Use a checkpoint in 8 or 4 bits (blip3o quantize), fewer or smaller pictures, or start ComfyUI with --lowvram or --cpu."
SMALLER_PICTURE = "Set a smaller width, height or batch_size of the picture."
TILED = "Use VAE {} (Tiled) with a smaller tile_size, or a smaller picture."


@contextmanager
def memory_advice(doing: str, advice: str) -> Iterator[None]:
    """Raises the host's out-of-memory error, also where torch has no class of its own for it, which is on the CPU."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise model_management.OOM_EXCEPTION(f"out of memory while {doing} ({first_line(error):.200}). {advice}") from error
