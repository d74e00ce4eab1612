"""Attention written out, for training on the CPU, where the backward pass of torch's fused kernel is slow.

Measured forward and backward in bfloat16 on one core, 32 x 64 tokens, 4 heads of 64: fused 39.9 ms, written out 15.1 ms; training
steps of nano's networks take 0.5 to 0.7 times as long. From about a thousand tokens (EVA-CLIP) the fused kernel is the faster one.
"""

import torch
from torch import Tensor, nn

from ..models.layers import Attend, attend

LENGTH_MULTIPLE = 32
"""Sequences are padded to a multiple of it. oneDNN compiles and keeps code for every shape that it meets: with lengths as they come,
a run on the CPU grew by 4 MB per step."""


def training_attend(device: torch.device) -> Attend:
    """The attention of the DiT for this device."""
    return attend_written_out if device.type == "cpu" else attend


def attend_written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, H, N, D), k and v (B, H, L, D) -> (B, H, N, D)."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def write_out_attention(network: nn.Module) -> None:
    """The same for a network of transformers, which reads its configuration at every call, or for diffusers' UNet."""
    if hasattr(network, "set_attn_processor"):
        from diffusers.models.attention_processor import AttnProcessor

        network.set_attn_processor(AttnProcessor())
    else:
        network.config._attn_implementation = "eager"
