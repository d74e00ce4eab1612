"""The SigLIP2 vision tower (arXiv:2502.14786): what the embeddings of the SANA decoder are.

A plain pre-norm ViT without class token, of which BLIP3-o takes the state before the last block and averages it to 8 x 8 tokens; the
last block, the final norm and the pooling head are not built. Module names are those of the checkpoint.

B batch, C width, g = image_size / patch_size, N = g * g tokens, H heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .eva_clip import EMBEDDING_GRID
from .layers import Attend, attend


@dataclass(frozen=True, kw_only=True)
class Siglip2Config:
    """Sizes of one tower; the defaults are those of so400m, patch 16, 512 pixels. `layers` counts the unused last one."""

    image_size: int = 512
    patch_size: int = 16
    width: int = 1152
    layers: int = 27
    heads: int = 16
    mlp_dim: int = 4304
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches along each axis."""
        return self.image_size // self.patch_size


class Siglip2(nn.Module):
    """Pixels to SigLIP2 features.

    Args of the constructor: `operations` supplies Linear, LayerNorm, Conv2d and Embedding (torch.nn, or a host's).
    """

    def __init__(self, config: Siglip2Config, *, dtype: torch.dtype | None = None, device=None, operations=nn) -> None:
        super().__init__()
        factory = {"dtype": dtype, "device": device, "operations": operations}
        self.config = config
        self.dtype = dtype
        self.embeddings = Embeddings(config, **factory)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(Block(config, **factory) for _ in range(config.layers - 1))

    def forward(self, pixel_values: Tensor, *, attend: Attend = attend) -> Tensor:
        """(B, 3, image_size, image_size) in -1..1 -> features (B, C, 8, 8)."""
        x = self.embeddings(pixel_values)  # (B, N, C)
        for block in self.encoder.layers:
            x = block(x, attend)
        return F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (self.config.grid, -1)), EMBEDDING_GRID)


class Embeddings(nn.Module):
    """One linear map per patch, as a convolution, and a learned vector per position."""

    def __init__(self, config: Siglip2Config, *, dtype, device, operations) -> None:
        super().__init__()
        self.patch_embedding = operations.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, dtype=dtype, device=device)
        self.position_embedding = operations.Embedding(config.grid**2, config.width, dtype=dtype, device=device)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, C)."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self.position_embedding(torch.arange(patches.shape[1], device=patches.device)).to(patches.dtype)


class Block(nn.Module):
    """Attention, then MLP, each behind a norm."""

    def __init__(self, config: Siglip2Config, *, dtype, device, operations) -> None:
        super().__init__()
        norm = {"eps": config.layer_norm_eps, "dtype": dtype, "device": device}
        self.layer_norm1 = operations.LayerNorm(config.width, **norm)
        self.self_attn = Attention(config, dtype=dtype, device=device, operations=operations)
        self.layer_norm2 = operations.LayerNorm(config.width, **norm)
        self.mlp = Mlp(config, dtype=dtype, device=device, operations=operations)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.self_attn(self.layer_norm1(x), attend)
        return x + self.mlp(self.layer_norm2(x))


class Attention(nn.Module):
    """Every token sees every token."""

    def __init__(self, config: Siglip2Config, *, dtype, device, operations) -> None:
        super().__init__()
        self.heads = config.heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.add_module(name, operations.Linear(config.width, config.width, dtype=dtype, device=device))

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = (project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps with GELU (tanh) between them."""

    def __init__(self, config: Siglip2Config, *, dtype, device, operations) -> None:
        super().__init__()
        self.fc1 = operations.Linear(config.width, config.mlp_dim, dtype=dtype, device=device)
        self.fc2 = operations.Linear(config.mlp_dim, config.width, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
