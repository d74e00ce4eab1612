"""The EVA-CLIP vision tower: what a CLIP embedding of BLIP3-o is, its training target, and the encoder of reconstruction.

A plain ViT (EVA-CLIP-E, arXiv:2303.15389) with norms after attention and MLP, inside the residual branch; no final norm, no
head. BLIP3-o keeps the patch tokens and averages them 4 x 4 (`early_pool2d_4`), or fewer where a small tower has larger patches. Module
names are those of the checkpoint.

B batch, C width, g = image_size / patch_size, N = 1 + g * g tokens (the first is the class token), H heads.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .layers import Attend, attend

EMBEDDING_GRID = 8  # tokens of an embedding along each axis
CONFIG_FIELDS = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio", "layer_norm_eps", "pooling")


@dataclass(frozen=True, kw_only=True)
class EvaClipConfig:
    """Sizes of one tower; the defaults are the published one's."""

    image_size: int = 448
    patch_size: int = 14
    width: int = 1792
    layers: int = 64
    head_width: int = 112
    mlp_dim: int = 15360
    layer_norm_eps: float = 1e-6
    pooling: int = 4  # cells of g x g that one embedding token averages, along each axis

    def __post_init__(self) -> None:
        if self.width % self.head_width:
            raise CheckpointError(f"an EVA-CLIP tower of width {self.width} can't have heads of width {self.head_width}. The head "
                                  "width is not in the tensors: put a config.json with head_width beside the weights.")
        if self.image_size % (self.patch_size * self.pooling):
            raise CheckpointError(f"an EVA-CLIP tower for {self.image_size} pixels in patches of {self.patch_size} can't be pooled "
                                  f"{self.pooling} x {self.pooling}. This is not BLIP3-o's tower; of another, put a config.json "
                                  "with pooling beside the weights.")

    @property
    def untold(self) -> dict[str, float]:
        """What the tensors don't tell, to be stored beside them; empty for the published tower."""
        own = {field: getattr(self, field) for field in ("head_width", "layer_norm_eps", "pooling")}
        return {} if all(value == getattr(EvaClipConfig, field) for field, value in own.items()) else own

    @property
    def heads(self) -> int:
        return self.width // self.head_width

    @property
    def grid(self) -> int:
        """Patches along each axis."""
        return self.image_size // self.patch_size

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], overrides: Mapping[str, Any], source: object) -> "EvaClipConfig":
        """Reads sizes off the tensors; a field of CONFIG_FIELDS in `overrides` (a config.json) wins, others are ignored.

        Only head_width, layer_norm_eps and pooling can't be read off: without an override they are the published ones.
        Raises CheckpointError naming `source` if a size is neither given nor readable, or makes no sense.
        """
        given = {field: _positive(overrides[field], field, source) for field in CONFIG_FIELDS if field in overrides}
        try:
            width, _, _, patch_size = shapes["patch_embed.proj.weight"]
            blocks = {int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")}
            tokens, mlp_dim = shapes["pos_embed"][1], shapes["blocks.0.mlp.fc1.weight"][0]
            layers = max(blocks) + 1
            if layers != len(blocks) or min(width, patch_size, tokens - 1, mlp_dim) < 1:
                raise ValueError(f"{len(blocks)} blocks numbered up to {layers - 1}, width {width}, {tokens} positions")
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(f"{source}: this is no EVA-CLIP tower, or an incomplete one; its sizes can't be read ({error}). "
                                  "Download jiuhai/eva_clip_vision_tower again.") from error
        width, patch_size = int(given.get("width", width)), int(given.get("patch_size", patch_size))
        return cls(
            image_size=int(given.get("image_size", math.isqrt(tokens - 1) * patch_size)),
            patch_size=patch_size,
            width=width,
            layers=int(given.get("layers", layers)),
            head_width=int(given.get("head_width", cls.head_width)),
            mlp_dim=round(width * given["mlp_ratio"]) if "mlp_ratio" in given else mlp_dim,
            layer_norm_eps=float(given.get("layer_norm_eps", cls.layer_norm_eps)),
            pooling=int(given.get("pooling", cls.pooling)),
        )


class EvaClip(nn.Module):
    """Pixels to CLIP features.

    Args of the constructor: `operations` supplies Linear, LayerNorm and Conv2d (torch.nn, or a host's).
    """

    def __init__(self, config: EvaClipConfig, *, dtype: torch.dtype | None = None, device=None, operations=nn) -> None:
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.config = config
        self.dtype = dtype
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width, **factory))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.grid**2, config.width, **factory))
        self.patch_embed = PatchEmbed(config, operations=operations, **factory)
        self.blocks = nn.ModuleList(EvaClipBlock(config, operations=operations, **factory) for _ in range(config.layers))

    def forward(self, pixel_values: Tensor, *, attend: Attend = attend) -> Tensor:
        """(B, 3, image_size, image_size) normalised as by CLIP -> features (B, C, g / pooling, g / pooling): 8 x 8."""
        grid = self.tokens(pixel_values, attend=attend).transpose(1, 2).unflatten(2, (self.config.grid, -1))  # (B, C, g, g)
        return F.avg_pool2d(grid, self.config.pooling)

    def tokens(self, pixel_values: Tensor, *, attend: Attend = attend) -> Tensor:
        """(B, 3, image_size, image_size) -> patch tokens (B, g * g, C), row-major, without the class token."""
        patches = self.patch_embed(pixel_values)  # (B, g * g, C)
        first = self.cls_token.to(device=patches.device, dtype=patches.dtype).expand(len(patches), -1, -1)
        x = torch.cat((first, patches), dim=1)  # (B, N, C)
        x = x + self.pos_embed.to(device=x.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, attend)
        return x[:, 1:]


class PatchEmbed(nn.Module):
    """One linear map per patch, as a convolution."""

    def __init__(self, config: EvaClipConfig, *, dtype, device, operations) -> None:
        super().__init__()
        self.proj = operations.Conv2d(3, config.width, config.patch_size, stride=config.patch_size, dtype=dtype, device=device)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, g * g, C)."""
        return self.proj(pixel_values).flatten(2).transpose(1, 2)


class EvaClipBlock(nn.Module):
    """Attention, then MLP; each result is normed before it is added."""

    def __init__(self, config: EvaClipConfig, *, dtype, device, operations) -> None:
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.norm1 = operations.LayerNorm(config.width, eps=config.layer_norm_eps, **factory)
        self.attn = Attention(config, operations=operations, **factory)
        self.norm2 = operations.LayerNorm(config.width, eps=config.layer_norm_eps, **factory)
        self.mlp = Mlp(config, operations=operations, **factory)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.norm1(self.attn(x, attend))
        return x + self.norm2(self.mlp(x))


class Attention(nn.Module):
    """Every token sees every token; no positions here."""

    def __init__(self, config: EvaClipConfig, *, dtype, device, operations) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = operations.Linear(config.width, 3 * config.width, dtype=dtype, device=device)
        self.proj = operations.Linear(config.width, config.width, dtype=dtype, device=device)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, H, N, C / H)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear maps with GELU (erf) between them."""

    def __init__(self, config: EvaClipConfig, *, dtype, device, operations) -> None:
        super().__init__()
        self.fc1 = operations.Linear(config.width, config.mlp_dim, dtype=dtype, device=device)
        self.fc2 = operations.Linear(config.mlp_dim, config.width, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.fc2(F.gelu(self.fc1(x)))


def _positive(value: object, field: str, source: object) -> float:
    whole = field not in ("mlp_ratio", "layer_norm_eps")
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{source}: {field} in config.json is {value!r}, which is no size. Download config.json again, or "
                              "delete it if it belongs to another model.")
    return value
