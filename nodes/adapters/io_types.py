"""Socket types of our own: only what has no native one."""

from comfy_api.v0_0_2 import io

Backbone = io.Custom("BLIP3O_BACKBONE")
"""Carries a `hosting.HostedBackbone`."""
