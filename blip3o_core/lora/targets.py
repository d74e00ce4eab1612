"""Which layers adapters go to unless the user says otherwise."""

DIT_TARGETS = (
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0",
    "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3",
)  # fmt: skip
"""All attention and feed-forward layers of the NextDiT's blocks (ends of module names)."""

LANGUAGE_MODEL_TARGETS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
"""The attention of the language model; its MLP would triple the size."""
