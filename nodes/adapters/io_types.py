"""Socket types of our own: only what has no native one."""

from comfy_api.v0_0_2 import io

Backbone = io.Custom("BLIP3O_BACKBONE")
"""Carries a `hosting.HostedBackbone`."""

VisionEncoder = io.Custom("BLIP3O_VISION_ENCODER")
"""Carries a `hosting.HostedVisionEncoder`."""

Conversation = io.Custom("BLIP3O_CONVERSATION")
"""Carries the JSON of `Chat.to_json`: a value, so that a cached graph never sees a conversation change under it."""
