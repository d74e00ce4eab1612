"""The language backbone: transformers' Qwen2.5-VL by composition, plus the 64 learned queries of BLIP3-o.

The decoder, its configuration and its rotary table are transformers'; names of tensors are those of `Qwen2_5_VLTextModel`
in every supported version (4.57 and 5.x), which is why no conversion table of transformers is involved.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError


def text_config(config: Mapping[str, Any], source: object):
    """`Qwen2_5_VLTextConfig` from a published config.json: flat as of transformers 4.51, or nested under `text_config`.

    Raises CheckpointError naming `source` if a size is missing.
    """
    import transformers
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    fields = {**config, **(config.get("text_config") or {})}
    rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
    try:
        sizes = {name: fields[name] for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        )}  # fmt: skip
        mrope_section = [int(size) for size in rope["mrope_section"]]
    except KeyError as error:
        raise CheckpointError(f"{source}: has no {error}; it doesn't describe a Qwen2.5-VL backbone. "
                              "Take config.json from the repository of the weights.") from error
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: rope_scaling.mrope_section is {rope['mrope_section']!r}, not three integers.") from error
    theta = float(rope.get("rope_theta", fields.get("rope_theta", 1e6)))
    if int(transformers.__version__.split(".")[0]) >= 5:
        positions = {"rope_parameters": {"rope_type": "default", "mrope_section": mrope_section, "rope_theta": theta}}
    else:
        positions = {"rope_scaling": {"rope_type": "default", "mrope_section": mrope_section}, "rope_theta": theta}
    result = Qwen2_5_VLTextConfig(
        **sizes, **positions,
        hidden_act=fields.get("hidden_act", "silu"),
        rms_norm_eps=fields.get("rms_norm_eps", 1e-6),
        max_position_embeddings=fields.get("max_position_embeddings", 128000),
        use_sliding_window=False,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
        use_cache=False,
    )  # fmt: skip
    result._attn_implementation = "sdpa"
    return result


class QueryEncoder(nn.Module):
    """Prompts -> states of the learned queries. Holds no output head and no vision tower: neither is needed for this.

    Attributes: `language_model` (Qwen2_5_VLTextModel), `latent_queries` (1, Q, hidden).
    """

    def __init__(self, config, num_queries: int) -> None:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        super().__init__()
        self.language_model = Qwen2_5_VLTextModel(config)
        self.latent_queries = nn.Parameter(torch.empty(1, num_queries, config.hidden_size))

    @classmethod
    def empty(cls, config, num_queries: int) -> "QueryEncoder":
        """Without weights, on the meta device, to be filled."""
        # before the meta context: what transformers and torch import lazily must not be built under it
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel  # noqa: F401

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
    def max_tokens(self) -> int:
        """Longest prompt in tokens: the context less `[IMG]` and the queries."""
        return self.language_model.config.max_position_embeddings - 1 - self.latent_queries.shape[1]

    def forward(
        self, token_ids: Sequence[Sequence[int]], *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Token ids per prompt, each ending in `[IMG]` -> states of the queries (B, Q, hidden), after the final norm.

        Rows are padded on the right, behind the queries: causality then makes a mask unnecessary and every row equal to
        a run by itself. Positions count up from 0 on all three axes, as in training.

        Args:
            device, dtype: where and in which precision to compute; None: as the weights are.
        """
        language_model, queries = self.language_model, self.latent_queries
        device, dtype = device or queries.device, dtype or queries.dtype
        language_model.rotary_emb.to(device)
        lengths = [len(ids) for ids in token_ids]
        padded = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for row, ids in enumerate(token_ids):
            padded[row, : len(ids)] = torch.tensor(ids)
        embedded = language_model.embed_tokens(padded.to(device)).to(dtype)  # (B, N, hidden)
        queries = queries.to(device=device, dtype=dtype)
        batch, count = len(lengths), queries.shape[1]
        rows = embedded.new_zeros(batch, max(lengths) + count, embedded.shape[-1])
        for row, length in enumerate(lengths):
            rows[row, :length] = embedded[row, :length]
            rows[row, length : length + count] = queries[0]
        states = language_model(inputs_embeds=rows, use_cache=False).last_hidden_state  # (B, N + Q, hidden)
        return torch.stack([states[row, length : length + count] for row, length in enumerate(lengths)])
