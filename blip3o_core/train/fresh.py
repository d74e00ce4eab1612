"""Random start values in place of a checkpoint's, for training a part from scratch.

The DiT, the queries and the decoder as the released code starts them (PyTorch's own initialisation, gates 0, norms 1, queries
standard normal). The language side is normal with the deviation 1 / sqrt(inputs): transformers' fixed 0.02 is that for 2500 inputs,
about the width of the published models, and far too little for small ones. With 0.02, nano's vision tower (width 128) was still at
chance after 9,600 pictures of single shapes (0.19 right of 6 classes); with this it had 0.26 after 6,400.
"""

import torch
from torch import nn

from ..models.eva_clip import EvaClip
from ..models.nextdit import NextDiTBlock
from .noise import hashed_seed

VIT_STD = 0.02
LANGUAGE_PARTS = ("backbone", "output_head", "vision")


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
            _start(module, normal=part in LANGUAGE_PARTS)
            done.update(map(id, own))
    missed = [name for name, parameter in network.named_parameters() if id(parameter) not in done]
    assert not missed, f"no start value for {missed[0]}"


def start_queries_afresh(queries: nn.Parameter, seed: int) -> None:
    """Standard normal."""
    generator = torch.Generator().manual_seed(hashed_seed(seed, "fresh", "latent_queries"))
    queries.data.copy_(torch.randn(queries.shape, generator=generator))


def _start(module: nn.Module, *, normal: bool) -> None:
    if isinstance(module, NextDiTBlock):
        nn.init.zeros_(module.gate)
    elif isinstance(module, EvaClip):
        nn.init.trunc_normal_(module.cls_token, std=VIT_STD)
        nn.init.trunc_normal_(module.pos_embed, std=VIT_STD)
    elif hasattr(module, "variance_epsilon"):  # transformers' RMS norm
        nn.init.ones_(module.weight)
    elif normal and isinstance(module, (nn.Linear, nn.Embedding, nn.Conv3d)):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)  # of an embedding: its width
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    elif hasattr(module, "latent_queries"):
        nn.init.normal_(module.latent_queries)
    else:
        module.reset_parameters()
