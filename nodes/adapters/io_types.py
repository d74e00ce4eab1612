"""Socket types of our own: only what has no native one."""

from comfy.model_patcher import ModelPatcher
from comfy_api.v0_0_2 import io

from ...blip3o_core.errors import InputError
from .hosting import HostedBackbone, HostedVisionEncoder

Backbone = io.Custom("BLIP3O_BACKBONE")
"""Carries a `HostedBackbone`."""

VisionEncoder = io.Custom("BLIP3O_VISION_ENCODER")
"""Carries a `HostedVisionEncoder`."""

Conversation = io.Custom("BLIP3O_CONVERSATION")
"""Carries the JSON of `Chat.to_json`: a value, so that a cached graph never sees a conversation change under it."""

_CARRIED = {
    "backbone": (HostedBackbone, "the backbone of Load BLIP3-o Checkpoint"),
    "vision_encoder": (HostedVisionEncoder, "Load BLIP3-o Vision Encoder"),
    "model": (ModelPatcher, "the model of Load BLIP3-o Checkpoint"),
}  # fmt: skip


def require_connected(**sockets: object) -> None:
    """Raises InputError for a socket that holds a constant, or nothing: the host lets a graph say so that was written by hand."""
    for name, value in sockets.items():
        carried, source = _CARRIED[name]
        if not isinstance(value, carried):
            raise InputError(f"{name} is {value!r:.60}, not the output of a node. Connect {source}.")
