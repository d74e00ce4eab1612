"""First lessons for a UNet that starts from nothing: look at those tokens of the embedding that lie where you are.

Nothing tells SDXL's UNet positions; it can only work them out from the borders, where convolutions meet zeros. Nano's had seen 100,000
latents before one head, in its last block, looked up what belongs where it was (to 0.1 cells), and no other head ever did: what the
embedding says reached two residual blocks only, and shapes stayed blurred. Asked for directly, one head of every block learns it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LOCAL_HEAD = 0
"""The head that has to look close by; the others may look where they like."""


@contextmanager
def local_attention(unet: nn.Module, height: int, width: int) -> Iterator[list[Tensor]]:
    """While it is open, each cross-attention of a forward pass adds its loss (B,): -log of what the local head gives to its own tokens.

    height, width: of the latents. The embedding has 8 x 8 tokens, or any square number.
    """
    losses: list[Tensor] = []

    def measure(attention: nn.Module, args: tuple, options: dict) -> None:
        hidden, context = args[0], options["encoder_hidden_states"]  # (B, N, H), (B, L, C)
        query, key = (states.unflatten(-1, (attention.heads, -1))[:, :, LOCAL_HEAD].float()
                      for states in (attention.to_q(hidden), attention.to_k(context)))  # fmt: skip
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, N, L)
        own = own_tokens(hidden.shape[1], height, width, math.isqrt(context.shape[1])).to(logits.device)
        losses.append(logits.logsumexp(dim=-1).sub(logits.masked_fill(~own, -math.inf).logsumexp(dim=-1)).mean(dim=1))

    hooks = [module.register_forward_pre_hook(measure, with_kwargs=True)
             for name, module in unet.named_modules() if name.endswith(".attn2")]  # fmt: skip
    try:
        yield losses
    finally:
        for hook in hooks:
            hook.remove()


def own_tokens(positions: int, height: int, width: int, side: int) -> Tensor:
    """Which of side x side tokens lie where each of the `positions` of a feature map lies (positions, side * side): one or more each.

    The map has the shape of the latents, height x width, scaled down.
    """
    scale = math.sqrt(height * width / positions)
    rows, columns = (_overlap(round(length / scale), side) for length in (height, width))
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _overlap(cells: int, tokens: int) -> Tensor:
    """(cells, tokens) along one axis: whether the middle of the one lies in the other, or on its border."""
    cell, token = (torch.arange(cells) + 0.5) / cells, (torch.arange(tokens) + 0.5) / tokens
    return (cell[:, None] - token[None]).abs() <= 0.5 / min(cells, tokens) + 1e-6
