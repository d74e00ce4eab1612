"""First lessons for a UNet or a DiT that starts from nothing: look at those tokens of the condition that lie where you are.

Nothing tells SDXL's UNet positions; it can only work them out from the borders, where convolutions meet zeros. Nano's had seen 100,000
latents before one head, in its last block, looked up what belongs where it was (to 0.1 cells), and no other head ever did: what the
embedding says reached two residual blocks only, and shapes stayed blurred. Asked for directly, one head of every block learns it.

The DiT knows where its own tokens are, by rotary positions, but the states of the queries carry none. Where query i learns to tell token i
(objective.regression_weight), nano's DiT still read only what all states have in common, the background, after 35,000 prompts.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.layers import apply_rope, rope_2d
from ..models.nextdit import NextDiT

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


def condition_attention_loss(dit: NextDiT, states: Tensor) -> Tensor:
    """Query states (B, side * side, H) -> loss (B,), averaged over blocks: -log of what the local head of token i would give to state i.

    Asked is for the part of the DiT's queries that is the same for every token and noise level, their norm's bias turned by the token's
    position: so it takes no pass through the DiT.
    """
    side, heads = math.isqrt(states.shape[1]), dit.config.num_heads
    rope = rope_2d(side, side, dit.config.dim // heads, states.device)
    own = torch.arange(states.shape[1], device=states.device)
    caption = dit.caption_projection(states)
    losses = []
    for layer in dit.layers:
        attention = layer.attn2
        bias = attention.norm_q.bias.float().unflatten(0, (heads, -1))[LOCAL_HEAD]
        query = apply_rope(bias.expand(1, len(own), 1, -1), rope)[0, :, 0]  # (N, D / H)
        key = attention.norm_k(attention.to_k(layer.norm1_context(caption))).unflatten(-1, (heads, -1))[:, :, LOCAL_HEAD].float()
        logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, N, L)
        losses.append(F.cross_entropy(logits.transpose(1, 2), own.expand(len(states), -1), reduction="none").mean(dim=1))
    return torch.stack(losses).mean(dim=0)


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
