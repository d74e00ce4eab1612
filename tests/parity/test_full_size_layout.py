"""Networks of the published sizes have exactly the tensors of the published files. Built without weights."""

import json
from pathlib import Path

import pytest
import torch

from blip3o_core.checkpoint.load import expected_shapes
from blip3o_core.checkpoint.shards import TensorEntry
from blip3o_core.models.nextdit import NextDiT, NextDiTConfig
from blip3o_core.models.qwen2_5_vl import Backbone, text_config
from blip3o_core.variants.blip3o import split_components

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
QWEN = {
    "8b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4),
    "4b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2),
}
UNET = {
    "act_fn": "silu", "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "cross_attention_dim": 1792, "in_channels": 4, "out_channels": 4, "sample_size": 128,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "layers_per_block": 2,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "norm_num_groups": 32,
    "projection_class_embeddings_input_dim": 3328, "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
}  # fmt: skip
VAE = {
    "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
    "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 1024,
    "up_block_types": ["UpDecoderBlock2D"] * 4, "force_upcast": True, "scaling_factor": 0.13025,
}  # fmt: skip


def manifest(name: str) -> dict[str, tuple[int, ...]]:
    return {key: tuple(shape) for key, shape in json.loads((MANIFESTS / f"{name}.json").read_text("utf-8")).items()}


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_backbone_and_dit_fit_the_published_root_shards(size):
    shapes = manifest(f"blip3o-{size}")
    entries = {name: TensorEntry(name, Path(size), torch.bfloat16, shape, 0, 0) for name, shape in shapes.items()}
    components = split_components(entries, Path(size))  # raises if the key table doesn't know a name
    found = {part: {name: entry.shape for name, entry in entries.items()} for part, entries in components.items()}

    config = text_config({**QWEN[size], "vocab_size": 151668, "rope_scaling": {"mrope_section": [16, 24, 24]}}, size)
    assert expected_shapes(Backbone.empty(config, 64)) == {**found["language_model"], **found["queries"]}

    dit_config = NextDiTConfig.from_shapes(found["dit"], size)
    assert dit_config == NextDiTConfig(context_dim=QWEN[size]["hidden_size"])  # the defaults are the published sizes
    with torch.device("meta"):
        dit = NextDiT(dit_config)
    assert expected_shapes(dit) == found["dit"]
    assert sum(parameter.numel() for parameter in dit.parameters()) == {"8b": 1_365_010_336, "4b": 1_362_257_824}[size]
    assert len(found["vision_encoder"]) == 772
    assert not found["skipped"]


@pytest.mark.parametrize(("name", "class_name", "config"), [("unet", "UNet2DConditionModel", UNET), ("vae", "AutoencoderKL", VAE)])
def test_diffusers_networks_fit_the_published_decoder(name, class_name, config):
    import diffusers

    network_class = getattr(diffusers, class_name)  # resolved before the meta context, which lazy imports don't survive
    with torch.device("meta"):
        network = network_class.from_config(config)
    assert expected_shapes(network) == manifest(f"diffusion-decoder-{name}")
