"""CLIP embeddings as LATENT."""

import torch
from comfy_api.v0_0_2 import io

from .adapters.latent_formats import ClipEmbedding


class Blip3oEmptyEmbedding(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oEmptyEmbedding",
            display_name="Empty BLIP3-o Embedding",
            category="BLIP3-o/embeddings",
            description="The starting point of the BLIP3-o diffusion model: an empty map of 8 x 8 CLIP features. The size of the "
            "picture is set later, at the decoder.",
            search_aliases=["Empty Latent BLIP3-o", "BLIP3o latent"],
            inputs=[
                io.Int.Input(
                    "batch_size", default=1, min=1, max=256, tooltip="How many embeddings, and so pictures, to sample at once."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The BLIP3-o diffusion model, for the width of its features. Nothing connected: 1792, "
                    "the width of 4B and 8B.",
                ),
            ],
            outputs=[io.Latent.Output(display_name="embedding", tooltip="Zeros, (batch, 1792, 8, 8) for 4B and 8B.")],
        )

    @classmethod
    def execute(cls, batch_size: int, model=None) -> io.NodeOutput:
        latent_format = ClipEmbedding if model is None else model.get_model_object("latent_format")
        return io.NodeOutput({"samples": torch.zeros(batch_size, latent_format.latent_channels, 8, 8)})
