"""Every size of nano, as the configuration files of a published checkpoint say them; those that such files lack come below."""

from typing import Any

from ..models.eva_clip import EvaClipConfig
from ..models.nextdit import NextDiTConfig
from ..sampling.discrete_euler import BETA_END, BETA_START, NUM_TRAIN_TIMESTEPS, STEPS_OFFSET

PICTURE_SIDE = 128  # of the world of shapes, and of what the decoder draws
PROMPT_SIDE = 140  # of pictures before Qwen's eyes: 5 x 5 cells of 28 pixels, the nearest size to 128
NUM_QUERIES = 64
VOCABULARY = 752  # of the byte-level BPE, without special tokens
WIDTH = 256  # of the backbone
EMBEDDING_WIDTH = 48  # C of a CLIP embedding

SPECIAL_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|im_start|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "[IMG]",
    "[/IMG]", "<image>",
)  # fmt: skip

DRAWING = {"guidance_scale": 3.0, "decoder_steps": 25, "decoder_guidance_scale": 1.0, "width": 128, "height": 128}
"""What pictures are drawn with by default. The decoder is not guided."""

EVA = EvaClipConfig(image_size=128, patch_size=16, width=EMBEDDING_WIDTH, layers=6, head_width=12, mlp_dim=288, pooling=1)
DIT = NextDiTConfig(in_channels=EMBEDDING_WIDTH, dim=192, num_layers=6, num_heads=4, ffn_dim=576, conditioning_dim=128, context_dim=WIDTH)


def model_config(token_ids: dict[str, int], vocab_size: int) -> dict[str, Any]:
    """config.json. token_ids: of SPECIAL_TOKENS."""
    return {
        "architectures": ["blip3oQwenForInferenceLM"],
        "model_type": "blip3o_qwen_inference",
        "bos_token_id": token_ids["<|endoftext|>"],
        "eos_token_id": token_ids["<|im_end|>"],
        "pad_token_id": token_ids["<|endoftext|>"],
        "gen_hidden_size": EMBEDDING_WIDTH,
        "gen_pooling": f"early_pool2d_{EVA.pooling}",
        "gen_vision_tower": "eva-clip-E-14-plus",
        "gen_vision_config": {"head_width": EVA.head_width, "layer_norm_eps": EVA.layer_norm_eps, "pooling": EVA.pooling},
        "n_query": NUM_QUERIES,
        "image_side": PROMPT_SIDE,
        "drawing": DRAWING,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_section": [8, 12, 12], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
        "image_token_id": token_ids["<|image_pad|>"],
        "video_token_id": token_ids["<|video_pad|>"],
        "vision_start_token_id": token_ids["<|vision_start|>"],
        "vision_end_token_id": token_ids["<|vision_end|>"],
        "vision_token_id": token_ids["<|vision_pad|>"],
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 4,
            "hidden_act": "silu",
            "hidden_size": 128,
            "intermediate_size": 240,
            "num_heads": 4,
            "in_channels": 3,
            "out_hidden_size": WIDTH,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "fullatt_block_indexes": [0, 1, 2, 3],
        },
        "torch_dtype": "bfloat16",
    }


UNET_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 32,
    "attention_head_dim": [1, 2, 2],  # numbers of heads
    "block_out_channels": [32, 80, 80],
    "center_input_sample": False,
    "cross_attention_dim": EMBEDDING_WIDTH,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 8,
    "out_channels": 4,
    "projection_class_embeddings_input_dim": EMBEDDING_WIDTH + 6 * 32,
    "sample_size": PICTURE_SIDE // 8,
    "transformer_layers_per_block": [1, 1, 1],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}

VAE_CONFIG: dict[str, Any] = {
    "_class_name": "AutoencoderKL",
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": PICTURE_SIDE,
    "scaling_factor": 1.0,  # set when the VAE is trained
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

SCHEDULER_CONFIG: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": BETA_END,
    "beta_schedule": "scaled_linear",
    "beta_start": BETA_START,
    "final_sigmas_type": "zero",
    "interpolation_type": "linear",
    "num_train_timesteps": NUM_TRAIN_TIMESTEPS,
    "prediction_type": "epsilon",
    "steps_offset": STEPS_OFFSET,
    "timestep_spacing": "leading",
    "timestep_type": "discrete",
    "use_karras_sigmas": False,
}
