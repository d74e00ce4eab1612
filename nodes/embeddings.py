"""CLIP embeddings as LATENT."""

import torch
from comfy_api.v0_0_2 import io, ui

from ..blip3o_core.embeddings import add_difference, interpolate
from ..blip3o_core.images import to_rgb_images
from ..blip3o_core.preview import principal_component_map
from .adapters import io_types
from .adapters.latent_formats import ClipEmbedding
from .adapters.memory import memory_advice
from .conditioning import embedding_tokens

INTERPOLATE, ADD_DIFFERENCE = "interpolate", "add difference"


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
        if model is not None:
            io_types.require_connected(model=model)
        latent_format = ClipEmbedding if model is None else model.get_model_object("latent_format")
        return io.NodeOutput({"samples": torch.zeros(batch_size, latent_format.latent_channels, 8, 8)})


class Blip3oImageEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oImageEncode",
            display_name="BLIP3-o Image Encode",
            category="BLIP3-o/embeddings",
            description="Turns pictures into the CLIP embeddings that BLIP3-o samples: decode one to reconstruct it, sample from it "
            "with denoise below 1 to vary it, mix it with others. Short side to 448 pixels, centre crop.",
            search_aliases=["BLIP3o VAE Encode", "CLIP vision encode", "image to embedding"],
            inputs=[
                io_types.VisionEncoder.Input("vision_encoder", tooltip="From Load BLIP3-o Vision Encoder."),
                io.Image.Input("images", tooltip="Pictures of any size; each of a batch gives one embedding."),
            ],
            outputs=[
                io.Latent.Output(display_name="embedding", tooltip="One embedding per picture, (batch, 1792, 8, 8) for 4B and 8B."),
                io.Latent.Output(
                    display_name="null_embedding",
                    tooltip="Embedding of the mean colour: the negative embedding with which the reference reconstructs.",
                ),
            ],
        )

    @classmethod
    def execute(cls, vision_encoder, images) -> io.NodeOutput:
        io_types.require_connected(vision_encoder=vision_encoder)
        with memory_advice("encoding pictures", "Give fewer or smaller pictures, or start ComfyUI with --lowvram or --cpu."):
            embeddings = vision_encoder.embed(to_rgb_images(images, channels_last=True))
            return io.NodeOutput({"samples": embeddings}, {"samples": vision_encoder.embed_null_image()})


class Blip3oMixEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oMixEmbeddings",
            display_name="BLIP3-o Mix Embeddings",
            category="BLIP3-o/embeddings",
            description="Arithmetic on meaning: a picture between two others, or one changed as two others differ.",
            search_aliases=["BLIP3o blend", "semantic arithmetic", "interpolate latents"],
            inputs=[
                io.Latent.Input("a", tooltip="An embedding, sampled or from BLIP3-o Image Encode."),
                io.Latent.Input("b", tooltip="Another embedding of the same model."),
                io.Combo.Input(
                    "mode", options=[INTERPOLATE, ADD_DIFFERENCE], default=INTERPOLATE,
                    tooltip="interpolate: a at weight 0, b at weight 1. add difference: a + weight x (b - minus).",
                ),
                io.Float.Input(
                    "weight", default=0.5, min=-2.0, max=3.0, step=0.05,
                    tooltip="How much of b; below 0 and above 1 it exaggerates.",
                ),
                io.Latent.Input(
                    "minus", optional=True, tooltip="Only for add difference: what b is compared with. Nothing connected: a."
                ),
            ],
            outputs=[io.Latent.Output(display_name="embedding", tooltip="The mixed embedding, in the batch size of the larger one.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, a: dict, b: dict, mode: str, weight: float, minus: dict | None = None) -> io.NodeOutput:
        for latent in (a, b, *([] if minus is None else [minus])):
            embedding_tokens(latent)  # raises for a latent of a picture
        if mode == INTERPOLATE:
            return io.NodeOutput({"samples": interpolate(a["samples"], b["samples"], weight)})
        base = a if minus is None else minus
        return io.NodeOutput({"samples": add_difference(a["samples"], b["samples"], base["samples"], weight)})


class Blip3oEmbeddingPreview(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oEmbeddingPreview",
            display_name="BLIP3-o Embedding Preview",
            category="BLIP3-o/embeddings",
            description="Shows an embedding as a colour map of its three principal components: which of its 8 x 8 places mean alike.",
            search_aliases=["BLIP3o preview", "show embedding", "PCA preview"],
            is_output_node=True,
            inputs=[io.Latent.Input("embedding", tooltip="An embedding, sampled, encoded or mixed.")],
            outputs=[io.Image.Output(display_name="image", tooltip="One colour map per embedding, 256 x 256 pixels.")],
        )

    @classmethod
    def execute(cls, embedding: dict) -> io.NodeOutput:
        embedding_tokens(embedding)  # raises for a latent of a picture
        image = (principal_component_map(embedding["samples"].float()).movedim(1, -1) + 1) / 2  # (B, H, W, 3) in 0..1
        return io.NodeOutput(image, ui=ui.PreviewImage(image, cls=cls))
