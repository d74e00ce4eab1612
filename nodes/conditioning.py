"""Prompt or embedding -> CONDITIONING."""

import torch
from comfy_api.v0_0_2 import io

from ..blip3o_core.errors import InputError
from ..blip3o_core.images import to_rgb_images
from ..blip3o_core.models.sdxl import ORIGINAL_SIZE
from ..blip3o_core.pipelines.language import POSITIONS, TRAINED_SIZE
from .adapters import io_types
from .adapters.memory import LESS_MEMORY, memory_advice

PUBLISHED_SIZE, OWN_SIZE = "448 x 448", "original"


class Blip3oTextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oTextEncode",
            display_name="BLIP3-o Text Encode",
            category="BLIP3-o/conditioning",
            description="Lets the backbone read a prompt, alone or with pictures to edit, and returns the states of its 64 queries, "
            "which guide the BLIP3-o diffusion model.",
            search_aliases=["BLIP3o prompt", "CLIP Text Encode BLIP3-o", "edit image BLIP3-o"],
            inputs=[
                io_types.Backbone.Input("backbone", tooltip="From Load BLIP3-o Checkpoint."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the picture should show, in whole sentences; with pictures, what to change. Special tokens are read "
                    "as plain text. The model was trained on up to about 400 tokens.",
                ),
                io.Boolean.Input(
                    "template",
                    default=True,
                    advanced=True,
                    tooltip="On: the prompt is put in the frame that the model was trained with. Off: raw text; a single "
                    "space is the null prompt of the decoder.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Pictures that the prompt is about: it then is an instruction, such as: make the sky purple. A batch "
                    "is several pictures in one prompt, in order.",
                ),
                io.Combo.Input(
                    "image_size",
                    options=[PUBLISHED_SIZE, OWN_SIZE],
                    default=PUBLISHED_SIZE,
                    advanced=True,
                    tooltip="448 x 448 squeezes every picture to 256 tokens, as the reference does (nano takes its own size in place "
                    "of it). original keeps size and shape, which shows more detail and takes more tokens.",
                ),
                io.Combo.Input(
                    "positions",
                    options=list(POSITIONS),
                    default=POSITIONS[0],
                    advanced=True,
                    tooltip="arange counts all tokens in a row, as the reference does when it draws. mrope gives picture tokens "
                    "rows and columns, as in understanding.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="Query states of the prompt, 64 tokens."),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The null condition of training: zeros in place of the query states."
                ),
            ],
        )

    @classmethod
    def execute(
        cls, backbone, prompt: str, template: bool = True, images=None, image_size: str = PUBLISHED_SIZE, positions: str = POSITIONS[0]
    ) -> io.NodeOutput:
        io_types.require_connected(backbone=backbone)
        size = TRAINED_SIZE if image_size == PUBLISHED_SIZE else None
        with memory_advice("reading the prompt", LESS_MEMORY):
            pictures = None if images is None else [to_rgb_images(images, channels_last=True)]
            states = backbone.encode_prompts([prompt], template=template, images=pictures, image_size=size, positions=positions)
        return io.NodeOutput([[states, {}]], [[torch.zeros_like(states), {}]])


class Blip3oEmbeddingToConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oEmbeddingToConditioning",
            display_name="BLIP3-o Embedding to Conditioning",
            category="BLIP3-o/conditioning",
            description="Hands a sampled CLIP embedding to the decoder, with the size that it should paint for.",
            search_aliases=["BLIP3o decode", "CLIP embedding conditioning"],
            inputs=[
                io.Latent.Input("embedding", tooltip="The sampled embedding, 64 tokens as a latent of 8 x 8."),
                io.Int.Input("width", default=1024, min=64, max=4096, step=8, tooltip="Width of the picture in pixels."),
                io.Int.Input("height", default=1024, min=64, max=4096, step=8, tooltip="Height of the picture in pixels."),
                io.Latent.Input(
                    "negative_embedding",
                    optional=True,
                    tooltip="What the decoder is guided away from. The reference samples it from the null prompt (BLIP3-o Text "
                    "Encode with a single space, template off). Nothing connected: zeros.",
                ),
                io.Int.Input(
                    "original_width", default=ORIGINAL_SIZE[1], min=64, max=4096, step=8, advanced=True,
                    tooltip="Width that the picture claims to have been cropped from; the reference always says 1024.",
                ),
                io.Int.Input(
                    "original_height", default=ORIGINAL_SIZE[0], min=64, max=4096, step=8, advanced=True,
                    tooltip="Height that the picture claims to have been cropped from; the reference always says 1024.",
                ),
                io.Int.Input(
                    "crop_x", default=0, min=0, max=4096, advanced=True, tooltip="Left edge of that crop; 0 in the reference."
                ),
                io.Int.Input(
                    "crop_y", default=0, min=0, max=4096, advanced=True, tooltip="Top edge of that crop; 0 in the reference."
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The embedding as the decoder reads it."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative embedding, or zeros, likewise."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, embedding: dict, width: int, height: int, negative_embedding: dict | None = None, original_width: int = ORIGINAL_SIZE[1],
        original_height: int = ORIGINAL_SIZE[0], crop_x: int = 0, crop_y: int = 0,
    ) -> io.NodeOutput:  # fmt: skip
        tokens = embedding_tokens(embedding)  # (B, 64, C)
        negative = torch.zeros_like(tokens) if negative_embedding is None else embedding_tokens(negative_embedding)
        if negative.shape[-1] != tokens.shape[-1]:
            raise InputError(f"the embedding has width {tokens.shape[-1]}, the negative one {negative.shape[-1]}. "
                             "Sample both with the same BLIP3-o model.")
        sizes = {"width": original_width, "height": original_height, "crop_w": crop_x, "crop_h": crop_y,
                 "target_width": width, "target_height": height}  # fmt: skip
        return io.NodeOutput(*([[context, {"pooled_output": context.mean(dim=1), **sizes}]] for context in (tokens, negative)))


def embedding_tokens(embedding: dict) -> torch.Tensor:
    """LATENT (B, C, 8, 8) -> (B, 64, C). Raises InputError for any other latent."""
    samples = embedding.get("samples") if isinstance(embedding, dict) else None
    if not isinstance(samples, torch.Tensor):
        raise InputError(f"this is {embedding!r:.60}, not a latent. Connect what the sampler of the BLIP3-o diffusion model returns.")
    if samples.ndim != 4 or tuple(samples.shape[-2:]) != (8, 8):
        raise InputError(f"this latent is {' x '.join(map(str, samples.shape[1:]))}, not a BLIP3-o embedding (C x 8 x 8). "
                         "Connect what the sampler of the BLIP3-o diffusion model returns.")
    return samples.flatten(2).transpose(1, 2).contiguous()
