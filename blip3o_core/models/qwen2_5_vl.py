"""The language backbone: transformers' Qwen2.5-VL by composition, plus the 64 learned queries of BLIP3-o.

Decoder, vision tower, their configurations and rotary tables are transformers'; names of tensors are the same in every
supported version (4.57 and 5.x), which is why no conversion table of transformers is involved.

B batch, N tokens, Q queries, H width of the backbone, n image tokens.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoint.settings import number, whole
from ..errors import CheckpointError, InputError
from .quantised import QuantisedEmbedding

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
MOST_LAYERS = 1000  # transformers lists something for each of them, before any network is built
PREPROCESSING = {"in_channels": 3, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
"""Of the vision tower: what `qwen_pixel_values` makes."""
ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu")


def text_config(config: Mapping[str, Any], source: object):
    """`Qwen2_5_VLTextConfig` from a published config.json: flat as of transformers 4.51, or nested under `text_config`.

    Raises CheckpointError naming `source` if a size is missing.
    """
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    fields = {**config, **_table(config, "text_config", source)}
    rope = _table(fields, "rope_parameters", source) or _table(fields, "rope_scaling", source)
    for name in (*SIZES, "mrope_section"):
        if name not in {**fields, **rope}:
            raise CheckpointError(f"{source}: has no {name!r}; it doesn't describe a Qwen2.5-VL backbone. "
                                  "Take config.json from the repository of the weights.")
    sizes = {name: whole(fields, name, source, high=MOST_LAYERS if name == "num_hidden_layers" else 2**31) for name in SIZES}
    head_width, rest = divmod(sizes["hidden_size"], sizes["num_attention_heads"])
    mrope_section = rope["mrope_section"]
    if rest or sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
        raise CheckpointError(f"{source}: {sizes['num_attention_heads']} heads with {sizes['num_key_value_heads']} for keys don't divide a "
                              f"width of {sizes['hidden_size']}. Take config.json from the repository of the weights.")
    threes = isinstance(mrope_section, list) and [type(size) for size in mrope_section] == [int] * 3 and min(mrope_section) >= 1
    if not threes or 2 * sum(mrope_section) != head_width:
        raise CheckpointError(f"{source}: rope_scaling.mrope_section is {mrope_section!r:.60}, not three integers whose sum is half of a "
                              f"head's width ({head_width}). Take config.json from the repository of the weights.")
    theta = number({"rope_theta": 1e6, **fields, **rope}, "rope_theta", source, low=1, high=1e12)
    if _transformers_major() >= 5:
        positions = {"rope_parameters": {"rope_type": "default", "mrope_section": mrope_section, "rope_theta": theta}}
    else:
        positions = {"rope_scaling": {"rope_type": "default", "mrope_section": mrope_section}, "rope_theta": theta}
    result = Qwen2_5_VLTextConfig(
        **sizes, **positions,
        hidden_act=_activation(fields, source),
        rms_norm_eps=number(fields, "rms_norm_eps", source, low=0, high=1, default=1e-6),
        max_position_embeddings=whole(fields, "max_position_embeddings", source, default=128000),
        use_sliding_window=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
        use_cache=False,
    )  # fmt: skip
    result._attn_implementation = "sdpa"
    return result


class Backbone(nn.Module):
    """The decoder and the learned queries. Output head and vision tower are modules of their own: most tasks need neither.

    Attributes: `language_model` (Qwen2_5_VLTextModel), `latent_queries` (1, Q, H).
    """

    def __init__(self, config, num_queries: int) -> None:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        super().__init__()
        self.language_model = Qwen2_5_VLTextModel(config)
        self.latent_queries = nn.Parameter(torch.empty(1, num_queries, config.hidden_size))

    @classmethod
    def empty(cls, config, num_queries: int) -> "Backbone":
        """Without weights, on the meta device, to be filled."""
        _import_network_code()
        with torch.device("meta"):
            return cls(config, num_queries)

    def rebuild_rotary_table(self) -> None:
        """The table is no tensor of the checkpoint: under the meta device it has no values until this is called."""
        kind = type(self.language_model.rotary_emb)
        table = kind(config=self.language_model.config)
        for module in self.language_model.modules():
            if isinstance(getattr(module, "rotary_emb", None), kind):  # transformers 4 keeps an unused one in every layer
                module.rotary_emb = table

    @property
    def num_queries(self) -> int:
        """Q: 64 in every published model."""
        return self.latent_queries.shape[1]

    @property
    def context_tokens(self) -> int:
        """Longest sequence the decoder takes."""
        return self.language_model.config.max_position_embeddings

    def embed(
        self, token_ids: Sequence[int], *, device: torch.device, dtype: torch.dtype,
        image_features: Tensor | None = None, image_token_id: int | None = None,
    ) -> Tensor:  # fmt: skip
        """Token ids -> (N, H) in `dtype`; rows of `image_token_id` are replaced, in order, by image_features (n, H).

        Raises: InputError if there are not exactly n such rows.
        """
        ids = torch.tensor(token_ids, dtype=torch.long, device=device)
        rows = self.language_model.embed_tokens(ids).to(dtype)
        if image_features is not None:
            pads = ids == image_token_id
            if int(pads.sum()) != len(image_features):
                raise InputError(f"the text has {int(pads.sum())} image tokens, the images give {len(image_features)}. Both must "
                                 "come from the same images, in the same order.")
            rows = rows.masked_scatter(pads[:, None], image_features.to(device, dtype))
        return rows

    def forward(self, rows: Sequence[Tensor], positions: Sequence[Tensor] | None = None, *, multiple: int = 1) -> Tensor:
        """Embedded prompts, each ending in `[IMG]` -> states of the queries (B, Q, H), after the final norm.

        Rows are padded on the right, behind the queries: causality then makes a mask unnecessary and every row equal to
        a run by itself.

        Args:
            rows: (N_b, H) each, as from `embed`.
            multiple: the padded length is a multiple of it. Training gains from few different lengths: see train/cpu_attention.py.
            positions: (3, N_b + Q) each; None counts up from 0 on all three axes, as the reference does even with images.
        """
        lengths, count = [len(row) for row in rows], self.num_queries
        queries = self.latent_queries.to(rows[0])
        longest = max(lengths) + count
        padded = rows[0].new_zeros(len(rows), longest + -longest % multiple, rows[0].shape[-1])
        for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            padded[index, :length] = row
            padded[index, length : length + count] = queries[0]
        position_ids = None
        if positions is not None:
            position_ids = torch.zeros(3, *padded.shape[:2], dtype=torch.long, device=padded.device)
            for index, position in enumerate(positions):
                position_ids[:, index, : position.shape[1]] = position
        states = self.decode(padded, position_ids)
        return torch.stack([states[index, length : length + count] for index, length in enumerate(lengths)])

    def decode(self, embedded: Tensor, position_ids: Tensor | None = None, cache=None) -> Tensor:
        """embedded (B, N, H), position_ids (3, B, N) -> states (B, N, H) after the final norm, no logits.

        Args:
            cache: a transformers `DynamicCache` that holds what comes before, and is extended.
        """
        self.language_model.rotary_emb.to(embedded.device)
        # transformers >= 5.24 calls it cache; the other name goes in 5.40
        name = "cache" if "cache" in inspect.signature(type(self.language_model).forward).parameters else "past_key_values"
        return self.language_model(
            inputs_embeds=embedded, position_ids=position_ids, use_cache=cache is not None, **{name: cache}
        ).last_hidden_state


def vision_config(config: Mapping[str, Any], source: object):
    """`Qwen2_5_VLVisionConfig` from a published config.json. Raises CheckpointError naming `source` if there is none."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    fields = config.get("vision_config")
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"{source}: has no vision_config, so the vision tower can't be built. Take config.json from the "
                              "repository of the weights.")
    published = Qwen2_5_VLVisionConfig()
    sizes = {name: whole(fields, name, source, default=getattr(published, name), high=MOST_LAYERS if name == "depth" else 2**31)
             for name in ("depth", "hidden_size", "intermediate_size", "num_heads", "window_size", "out_hidden_size")}  # fmt: skip
    cell = PREPROCESSING["patch_size"] * PREPROCESSING["spatial_merge_size"]
    whole_blocks = fields.get("fullatt_block_indexes", published.fullatt_block_indexes)
    problems = [
        *(f"{name} is {fields[name]!r:.60}, not {value}" for name, value in PREPROCESSING.items() if fields.get(name, value) != value),
        *([f"{sizes['num_heads']} heads don't divide a width of {sizes['hidden_size']} into multiples of 4"]
          if sizes["hidden_size"] % (4 * sizes["num_heads"]) else []),
        *([f"window_size is {sizes['window_size']}, not a multiple of {cell}"] if sizes["window_size"] % cell else []),
        *([f"fullatt_block_indexes is {whole_blocks!r:.60}, not a list of blocks"]
          if not isinstance(whole_blocks, list) or not all(type(index) is int for index in whole_blocks) else []),
    ]  # fmt: skip
    if problems:
        raise CheckpointError(f"{source}: vision_config makes no sense: {'; '.join(problems)}. Take config.json from the repository of "
                              "the weights.")
    result = Qwen2_5_VLVisionConfig(**sizes, **PREPROCESSING, hidden_act=_activation(fields, source), fullatt_block_indexes=whole_blocks)
    result._attn_implementation = "sdpa"
    return result


def _table(fields: Mapping[str, Any], name: str, source: object) -> Mapping[str, Any]:
    """A part of the configuration, empty if it isn't there."""
    table = fields.get(name) or {}
    if not isinstance(table, Mapping):
        raise CheckpointError(f"{source}: {name} is {table!r:.60}, not a table. Take config.json from the repository of the weights.")
    return table


def _activation(fields: Mapping[str, Any], source: object) -> str:
    name = fields.get("hidden_act", "silu")
    if name not in ACTIVATIONS:
        raise CheckpointError(f"{source}: hidden_act is {name!r:.60}, not one of {', '.join(ACTIVATIONS)}. Take config.json from the "
                              "repository of the weights.")
    return name


class VisionTower(nn.Module):
    """transformers' Qwen2.5-VL vision transformer: patches -> one feature per 2 x 2 cell, in the width of the backbone."""

    def __init__(self, config) -> None:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        super().__init__()
        self.network = Qwen2_5_VisionTransformerPretrainedModel(config)

    @classmethod
    def empty(cls, config) -> "VisionTower":
        """Without weights, on the meta device, to be filled."""
        _import_network_code()
        with torch.device("meta"):
            return cls(config)

    def rebuild_rotary_table(self) -> None:
        """As in `Backbone`: the table has no values after construction on the meta device."""
        config, kind = self.network.config, type(self.network.rotary_pos_emb)
        old = _transformers_major() < 5
        self.network.rotary_pos_emb = kind(config.hidden_size // config.num_heads // 2) if old else kind(config)

    @property
    def merge_size(self) -> int:
        """Patches per cell, along each axis."""
        return self.network.config.spatial_merge_size

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """pixel_values (sum of t * h * w, 1176), grid_thw (images, 3) -> features (sum of t * h * w / 4, H), image after image."""
        self.network.rotary_pos_emb.to(pixel_values.device)
        output = self.network(pixel_values, grid_thw=grid_thw)
        return output if isinstance(output, Tensor) else output.pooler_output  # transformers 4, 5


class TiedHead(nn.Module):
    """States -> logits with the embedding matrix of the backbone, which stays the backbone's: no parameter of its own."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self._backbone = [backbone]  # in a list, so that it is no submodule

    def forward(self, states: Tensor) -> Tensor:
        """(B, H) -> (B, vocabulary)."""
        table = self._backbone[0].language_model.embed_tokens
        return table.project(states) if isinstance(table, QuantisedEmbedding) else F.linear(states, table.weight.to(states))


def _transformers_major() -> int:
    import transformers

    return int(transformers.__version__.split(".")[0])


def _import_network_code() -> None:
    """Before the meta context: what transformers and torch import lazily must not be built under it."""
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl  # noqa: F401
