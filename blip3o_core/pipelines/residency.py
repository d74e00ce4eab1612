"""Which networks are in memory at once: all, those of one stage, or one layer at a time."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..checkpoint.shards import TensorEntry
from ..errors import InputError

OFFLOADS = ("none", "stage", "layer")
"""none keeps every network that was needed; stage frees those of the other stages when one begins; layer reads each layer when it runs."""
STAGES: dict[str, tuple[str, ...]] = {
    "language": ("backbone", "vision_tower", "output_head"), "embedding": ("dit",),
    "encoder": ("vision_encoder", "decoder_encoder"), "picture": ("decoder",),
}  # fmt: skip
"""Stage -> networks of the pipeline. They run one after the other."""
USABLE = 0.8  # of the free memory; the rest is for what passes through the networks


def require_offload(offload: str | None) -> None:
    """Raises InputError for what is neither "auto" (also None) nor one of OFFLOADS."""
    if offload not in (None, "auto", *OFFLOADS):
        raise InputError(f"offload {offload!r} is unknown. Use auto or one of {', '.join(OFFLOADS)}.")


def others(network: str) -> list[str]:
    """Networks of all stages but that of this one."""
    return [name for names in STAGES.values() if network not in names for name in names]


def choose(stage_bytes: Mapping[str, int], free: int | None) -> str:
    """none if all stages fit into free memory together, stage if each one does, else layer. Unknown free memory is enough."""
    if free is None or sum(stage_bytes.values()) <= USABLE * free:
        return "none"
    return "stage" if max(stage_bytes.values()) <= USABLE * free else "layer"


def weight_bytes(entries: Mapping[str, TensorEntry], dtype: torch.dtype) -> int:
    """In memory, as `dtype`; what is stored in bytes (quantised) stays so."""
    return sum(entry.nbytes if entry.dtype.itemsize == 1 else entry.numel * dtype.itemsize for entry in entries.values())


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be taken on the device; None where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    available = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if available is None else int(available) * 1024
