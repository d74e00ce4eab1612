"""The flow-matching transformer that turns 64 query states into an 8 x 8 map of CLIP features.

Lumina-Next's NextDiT (arXiv:2406.18583) as BLIP3-o uses it (arXiv:2505.09568): patch size 1, no output projection of the
self-attention, one shared projection of both attentions, scale-only modulation. Module names are those of the checkpoint.
Everything that depends on the condition alone is computed once (`encode_condition`) and reused by all sampling steps.

B batch, N = height * width image tokens, L condition tokens, C feature channels, D width, H heads, T conditioning width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError
from .layers import Attend, apply_rope, attend, rope_2d, timestep_sinusoid

TIMESTEP_CHANNELS = 256
NORM_EPS = 1e-5
FINAL_NORM_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class NextDiTConfig:
    """Sizes of one NextDiT; the defaults are the published 8B model's."""

    in_channels: int = 1792  # C of the CLIP embedding that is denoised
    dim: int = 1792
    num_layers: int = 24
    num_heads: int = 28
    ffn_dim: int = 4864
    conditioning_dim: int = 1024  # T, width of the timestep + pooled-caption vector
    context_dim: int = 3584  # width of the backbone's query states

    def __post_init__(self) -> None:
        if min(self.in_channels, self.dim, self.num_layers, self.num_heads, self.ffn_dim, self.conditioning_dim, self.context_dim) < 1:
            raise CheckpointError(f"a diffusion transformer without size ({self}). Its tensors are damaged; download the checkpoint again.")
        if self.dim % (4 * self.num_heads):
            raise CheckpointError(f"a NextDiT of width {self.dim} can't have {self.num_heads} heads: 2D rope needs a head "
                                  "width that is a multiple of 4. The tensors of different models are mixed.")

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]], source: object) -> "NextDiTConfig":
        """Reads all sizes off the tensors; config.json doesn't hold them. Raises CheckpointError naming `source`."""
        layers = {int(name.split(".")[1]) for name in shapes if name.startswith("layers.") and name.split(".")[1].isdigit()}
        try:
            if max(layers) + 1 != len(layers):
                raise ValueError(f"{len(layers)} layers numbered up to {max(layers)}")
            dim, in_channels = shapes["patch_embedder.proj.weight"]
            return cls(
                in_channels=in_channels,
                dim=dim,
                num_layers=len(layers),
                num_heads=shapes["layers.0.gate"][0],
                ffn_dim=shapes["layers.0.feed_forward.linear_1.weight"][0],
                conditioning_dim=shapes["layers.0.norm1.linear.weight"][1],
                context_dim=shapes["caption_projection.linear_1.weight"][1],
            )
        except (KeyError, ValueError, IndexError) as error:
            raise CheckpointError(f"{source}: the diffusion transformer is incomplete ({error}); its sizes can't be read. "
                                  "Download the checkpoint again.") from error


@dataclass(frozen=True)
class Condition:
    """What all sampling steps share for one batch of query states. The first n of B rows may be the null condition."""

    pooled: Tensor  # (B, T) caption part of the modulation vector
    keys_values: tuple[tuple[Tensor, Tensor], ...]  # per layer, of the other rows: (B - n, H, L, D / H) twice
    null_values: tuple[Tensor, ...] | None = None  # per layer, of the null rows: (n, H, 1, D / H), what their cross-attention gives

    def after_null(self, null: "NullCondition") -> "Condition":
        """The doubled batch of guidance: as many null rows, then these."""
        rows = len(self.pooled)
        return Condition(
            pooled=torch.cat((null.pooled.expand(rows, -1), self.pooled)),
            keys_values=self.keys_values,
            null_values=tuple(values.expand(rows, -1, -1, -1) for values in null.values),
        )


@dataclass(frozen=True)
class NullCondition:
    """What is left of a condition whose query states are all zero. All of its tokens are the same, so attention to them, whatever the
    queries, gives the values of one."""

    pooled: Tensor  # (1, T)
    values: tuple[Tensor, ...]  # per layer (1, H, 1, D / H)


RunLayer = Callable[[int, Callable[[Tensor], Tensor], Tensor], Tensor]
"""(index, layer, hidden (B, N, D)) -> hidden: where a host replaces or watches a block."""


class NextDiT(nn.Module):
    """Predicts the velocity noise - data of a CLIP embedding.

    Args of the constructor: `operations` supplies Linear, LayerNorm and RMSNorm (torch.nn, or a host's).
    """

    def __init__(self, config: NextDiTConfig, *, dtype: torch.dtype | None = None, device=None, operations=nn) -> None:
        super().__init__()
        factory = {"dtype": dtype, "device": device, "operations": operations}
        self.config = config
        self.dtype = dtype
        self.patch_embedder = PatchEmbedder(config, **factory)
        self.caption_projection = CaptionProjection(config, **factory)
        self.time_caption_embed = TimeCaptionEmbedding(config, **factory)
        self.layers = nn.ModuleList(NextDiTBlock(config, **factory) for _ in range(config.num_layers))
        self.norm_out = ModulatedOutput(config, **factory)

    def forward(self, x: Tensor, timestep: Tensor, z: Tensor, *, attend: Attend = attend) -> Tensor:
        """x (B, C, h, w), timestep (B,) in 0..1000, query states z (B, L, context_dim) -> velocity (B, C, h, w)."""
        return self.denoise(x, timestep, self.encode_condition(z), attend=attend)

    def encode_condition(self, z: Tensor) -> Condition:
        """Query states (B, L, context_dim) -> everything computed from them, for any number of `denoise` calls."""
        caption = self.caption_projection(z)  # (B, L, D)
        return Condition(
            pooled=self.time_caption_embed.caption(caption),
            keys_values=tuple(layer.encode_context(caption) for layer in self.layers),
        )

    def encode_null(self, like: Tensor) -> NullCondition:
        """The condition of zeros in place of query states; `like` says device and dtype."""
        caption = self.caption_projection(like.new_zeros(1, 1, self.config.context_dim))
        return NullCondition(
            pooled=self.time_caption_embed.caption(caption),
            values=tuple(layer.encode_context(caption)[1] for layer in self.layers),
        )

    def denoise(
        self, x: Tensor, timestep: Tensor, condition: Condition, *, attend: Attend = attend, run_layer: RunLayer | None = None
    ) -> Tensor:
        """One step: x (B, C, h, w), timestep (B,) in 0..1000 -> velocity (B, C, h, w), dtype of x kept."""
        height, width = x.shape[-2:]
        rope = rope_2d(height, width, self.config.dim // self.config.num_heads, x.device)
        modulation = F.silu(self.time_caption_embed.timestep(timestep, x.dtype) + condition.pooled)  # (B, T)
        hidden = self.patch_embedder(x.flatten(2).transpose(1, 2))  # (B, N, D)
        null_values = condition.null_values or [None] * len(self.layers)
        for index, (layer, *context) in enumerate(zip(self.layers, condition.keys_values, null_values, strict=True)):

            def run(h: Tensor, layer: NextDiTBlock = layer, context: list = context) -> Tensor:
                return layer(h, *context, modulation, rope, attend)

            hidden = run(hidden) if run_layer is None else run_layer(index, run, hidden)
        velocity = self.norm_out(hidden, modulation)  # (B, N, C)
        return velocity.transpose(1, 2).unflatten(2, (height, width))


class PatchEmbedder(nn.Module):
    """One linear map per token (patch size 1)."""

    def __init__(self, config: NextDiTConfig, *, dtype, device, operations) -> None:
        super().__init__()
        self.proj = operations.Linear(config.in_channels, config.dim, dtype=dtype, device=device)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, D)."""
        return self.proj(tokens)


class CaptionProjection(nn.Module):
    """Query states to the width of the transformer."""

    def __init__(self, config: NextDiTConfig, *, dtype, device, operations) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(config.context_dim, config.dim, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(config.dim, config.dim, dtype=dtype, device=device)

    def forward(self, z: Tensor) -> Tensor:
        """(B, L, context_dim) -> (B, L, D)."""
        return self.linear_2(F.gelu(self.linear_1(z), approximate="tanh"))


class TimestepEmbedder(nn.Module):
    """Sinusoid of the timestep through two linear maps."""

    def __init__(self, config: NextDiTConfig, *, dtype, device, operations) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(TIMESTEP_CHANNELS, config.conditioning_dim, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(config.conditioning_dim, config.conditioning_dim, dtype=dtype, device=device)

    def forward(self, sinusoid: Tensor) -> Tensor:
        """(B, 256) -> (B, T)."""
        return self.linear_2(F.silu(self.linear_1(sinusoid)))


class TimeCaptionEmbedding(nn.Module):
    """The two halves of the modulation vector: timestep, and the caption averaged over its tokens."""

    def __init__(self, config: NextDiTConfig, *, dtype, device, operations) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedder(config, dtype=dtype, device=device, operations=operations)
        self.caption_embedder = nn.Sequential(
            operations.LayerNorm(config.dim, eps=NORM_EPS, dtype=dtype, device=device),
            operations.Linear(config.dim, config.conditioning_dim, dtype=dtype, device=device),
        )

    def timestep(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        """(B,) in 0..1000 -> (B, T); the sinusoid is float32, then cast to `dtype`."""
        return self.timestep_embedder(timestep_sinusoid(timestep, TIMESTEP_CHANNELS).to(dtype))

    def caption(self, caption: Tensor) -> Tensor:
        """(B, L, D) -> (B, T)."""
        return self.caption_embedder(caption.mean(dim=1))


class NextDiTBlock(nn.Module):
    """Self- and cross-attention side by side from the same modulated tokens, then a gated feed-forward."""

    def __init__(self, config: NextDiTConfig, *, dtype, device, operations) -> None:
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.gate = nn.Parameter(torch.empty(config.num_heads, **factory))  # strength of the cross-attention per head
        self.attn1 = Attention(config, has_output=False, operations=operations, **factory)
        self.attn2 = Attention(config, has_output=True, operations=operations, **factory)
        self.feed_forward = FeedForward(config, operations=operations, **factory)
        self.norm1 = ModulatedNorm(config, operations=operations, **factory)
        self.norm1_context = operations.RMSNorm(config.dim, eps=NORM_EPS, **factory)
        self.norm2 = operations.RMSNorm(config.dim, eps=NORM_EPS, **factory)
        self.ffn_norm1 = operations.RMSNorm(config.dim, eps=NORM_EPS, **factory)
        self.ffn_norm2 = operations.RMSNorm(config.dim, eps=NORM_EPS, **factory)

    def encode_context(self, caption: Tensor) -> tuple[Tensor, Tensor]:
        """caption (B, L, D) -> keys and values of the cross-attention, each (B, H, L, D / H); keys carry no position."""
        return self.attn2.keys_values(self.norm1_context(caption), rope=None)

    def forward(
        self, hidden: Tensor, context: tuple[Tensor, Tensor], null_values: Tensor | None, modulation: Tensor,
        rope: tuple[Tensor, Tensor], attend: Attend,
    ) -> Tensor:  # fmt: skip
        """hidden (B, N, D), context as from `encode_context`, modulation (B, T) after silu -> (B, N, D).

        null_values: (n, H, 1, D / H) of the first n rows, which `context` leaves out.
        """
        normed, attention_gate, ffn_scale, ffn_gate = self.norm1(hidden, modulation)
        own = attend(self.attn1.queries(normed, rope), *self.attn1.keys_values(normed, rope))  # (B, H, N, D / H)
        nulls = 0 if null_values is None else len(null_values)
        cross = attend(self.attn2.queries(normed[nulls:], rope), *context)  # (B - n, H, N, D / H)
        if nulls:
            cross = torch.cat((null_values.expand(-1, -1, cross.shape[2], -1), cross))
        gate = self.gate.to(device=hidden.device, dtype=hidden.dtype).tanh()[:, None, None]
        mixed = self.attn2.output(own + gate * cross)  # (B, N, D)
        hidden = hidden + attention_gate.tanh() * self.norm2(mixed)
        fed = self.feed_forward(self.ffn_norm1(hidden) * (1 + ffn_scale))
        return hidden + ffn_gate.tanh() * self.ffn_norm2(fed)


class ModulatedNorm(nn.Module):
    """RMS norm scaled by the modulation vector, which also yields the gates of the block and the scale of its MLP."""

    def __init__(self, config: NextDiTConfig, *, dtype, device, operations) -> None:
        super().__init__()
        self.linear = operations.Linear(config.conditioning_dim, 4 * config.dim, dtype=dtype, device=device)
        self.norm = operations.RMSNorm(config.dim, eps=NORM_EPS, dtype=dtype, device=device)

    def forward(self, hidden: Tensor, modulation: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, N, D), (B, T) -> normed (B, N, D), then attention gate, MLP scale, MLP gate, each (B, 1, D)."""
        scale, attention_gate, ffn_scale, ffn_gate = self.linear(modulation)[:, None].chunk(4, dim=-1)
        return self.norm(hidden) * (1 + scale), attention_gate, ffn_scale, ffn_gate


class Attention(nn.Module):
    """Projections of one attention; LayerNorm of q and k spans all heads, before the head split."""

    def __init__(self, config: NextDiTConfig, *, has_output: bool, dtype, device, operations) -> None:
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.heads = config.num_heads
        self.to_q = operations.Linear(config.dim, config.dim, bias=False, **factory)
        self.to_k = operations.Linear(config.dim, config.dim, bias=False, **factory)
        self.to_v = operations.Linear(config.dim, config.dim, bias=False, **factory)
        self.norm_q = operations.LayerNorm(config.dim, eps=NORM_EPS, **factory)
        self.norm_k = operations.LayerNorm(config.dim, eps=NORM_EPS, **factory)
        if has_output:
            self.to_out = nn.ModuleList([operations.Linear(config.dim, config.dim, bias=False, **factory)])

    def queries(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """(B, N, D) -> (B, H, N, D / H), rotated."""
        return apply_rope(self._split(self.norm_q(self.to_q(x))), rope).transpose(1, 2)

    def keys_values(self, x: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> k, v, each (B, H, L, D / H); k rotated unless rope is None."""
        k = self._split(self.norm_k(self.to_k(x)))  # (B, L, H, D / H)
        k = k if rope is None else apply_rope(k, rope)
        return k.transpose(1, 2), self._split(self.to_v(x)).transpose(1, 2)

    def output(self, heads: Tensor) -> Tensor:
        """(B, H, N, D / H) -> (B, N, D)."""
        return self.to_out[0](heads.transpose(1, 2).flatten(2))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))  # (B, L, H, D / H)


class FeedForward(nn.Module):
    """silu(linear_1) * linear_3, then linear_2; no biases."""

    def __init__(self, config: NextDiTConfig, *, dtype, device, operations) -> None:
        super().__init__()
        factory = {"bias": False, "dtype": dtype, "device": device}
        self.linear_1 = operations.Linear(config.dim, config.ffn_dim, **factory)
        self.linear_2 = operations.Linear(config.ffn_dim, config.dim, **factory)
        self.linear_3 = operations.Linear(config.dim, config.ffn_dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.linear_2(F.silu(self.linear_1(x)) * self.linear_3(x))


class ModulatedOutput(nn.Module):
    """Final LayerNorm without weights, scaled by the modulation vector, and the map back to feature channels."""

    def __init__(self, config: NextDiTConfig, *, dtype, device, operations) -> None:
        super().__init__()
        factory = {"dtype": dtype, "device": device}
        self.linear_1 = operations.Linear(config.conditioning_dim, config.dim, **factory)
        self.linear_2 = operations.Linear(config.dim, config.in_channels, **factory)
        self.norm = operations.LayerNorm(config.dim, eps=FINAL_NORM_EPS, elementwise_affine=False, **factory)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        """(B, N, D), (B, T) -> (B, N, C)."""
        return self.linear_2(self.norm(hidden) * (1 + self.linear_1(modulation)[:, None]))
