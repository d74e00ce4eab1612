"""Random start values in place of a checkpoint's, for training a part from scratch.

The DiT, the queries and the decoder as the released code starts them (PyTorch's own initialisation, gates 0, norms 1, queries
standard normal); the language side as transformers does (normal, deviation 0.02).
"""

import torch
from torch import nn

from ..models.eva_clip import EvaClip
from ..models.nextdit import NextDiTBlock
from .noise import hashed_seed

TRANSFORMERS_STD = 0.02
TRANSFORMERS_PARTS = ("backbone", "output_head", "vision")


@torch.no_grad()
def start_afresh(network: nn.Module, part: str, seed: int) -> None:
    """Overwrites every parameter of `network`, in place; the same seed gives the same values on every machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(seed, "fresh", part))
        done: set[int] = set()
        for module in network.modules():
            own = list(module.parameters(recurse=False))
            if not own:
                continue
            _start(module, like_transformers=part in TRANSFORMERS_PARTS)
            done.update(map(id, own))
    missed = [name for name, parameter in network.named_parameters() if id(parameter) not in done]
    assert not missed, f"no start value for {missed[0]}"


def start_queries_afresh(queries: nn.Parameter, seed: int) -> None:
    """Standard normal."""
    generator = torch.Generator().manual_seed(hashed_seed(seed, "fresh", "latent_queries"))
    queries.data.copy_(torch.randn(queries.shape, generator=generator))


def _start(module: nn.Module, *, like_transformers: bool) -> None:
    if isinstance(module, NextDiTBlock):
        nn.init.zeros_(module.gate)
    elif isinstance(module, EvaClip):
        nn.init.trunc_normal_(module.cls_token, std=TRANSFORMERS_STD)
        nn.init.trunc_normal_(module.pos_embed, std=TRANSFORMERS_STD)
    elif hasattr(module, "variance_epsilon"):  # transformers' RMS norm
        nn.init.ones_(module.weight)
    elif like_transformers and isinstance(module, (nn.Linear, nn.Embedding, nn.Conv3d)):
        nn.init.normal_(module.weight, std=TRANSFORMERS_STD)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "latent_queries"):
        nn.init.normal_(module.latent_queries)
    else:
        module.reset_parameters()
