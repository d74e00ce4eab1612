"""Picked folder -> backbone, MODEL, VAE."""

from comfy_api.v0_0_2 import io

from ..blip3o_core.variants.blip3o import Blip3oCheckpoint
from ..blip3o_core.variants.eva_clip import EvaClipCheckpoint
from ..blip3o_core.variants.sdxl_decoder import SdxlDecoderCheckpoint
from .adapters import folders, io_types, loading


class Blip3oCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oCheckpointLoader",
            display_name="Load BLIP3-o Checkpoint",
            category="BLIP3-o/loaders",
            description="Opens a BLIP3-o folder (4B, 8B or smaller): the language backbone that reads prompts, and the diffusion "
            "model that turns what it understood into a CLIP embedding. Reads only what text to image needs.",
            search_aliases=["BLIP3o", "BLIP3-o model", "Qwen2.5-VL image generation"],
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=folders.list_checkpoints(),
                    tooltip="Folder under models/blip3o that holds config.json, the tokenizer and model*.safetensors. "
                    "Other places: the key blip3o of extra_model_paths.yaml. Press R after adding a folder.",
                )
            ],
            outputs=[
                io_types.Backbone.Output(
                    display_name="backbone", tooltip="Qwen2.5-VL with the 64 learned queries; for BLIP3-o Text Encode."
                ),
                io.Model.Output(
                    display_name="model",
                    tooltip="The diffusion transformer over CLIP embeddings; a native MODEL for KSampler, LoRA loaders, "
                    "ModelSamplingSD3 and so on. Its latents come from Empty BLIP3-o Embedding.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str) -> str:
        return folders.fingerprint(folders.resolve(checkpoint))

    @classmethod
    def execute(cls, checkpoint: str) -> io.NodeOutput:
        opened = Blip3oCheckpoint.open(folders.resolve(checkpoint))
        return io.NodeOutput(loading.load_backbone(opened), loading.load_dit(opened))


class Blip3oSDXLDecoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oSDXLDecoderLoader",
            display_name="Load BLIP3-o SDXL Decoder",
            category="BLIP3-o/loaders",
            description="Opens the diffusion decoder of a BLIP3-o folder: an SDXL-shaped UNet that draws what a CLIP embedding "
            "says, and its VAE. An ordinary SDXL checkpoint can't take its place.",
            search_aliases=["BLIP3o decoder", "diffusion-decoder", "Emu2 visual decoder"],
            inputs=[
                io.Combo.Input(
                    "decoder",
                    options=folders.list_sdxl_decoders(),
                    tooltip="Folder under models/blip3o with unet/, vae/ and scheduler/, or a checkpoint that holds such a "
                    "folder as diffusion-decoder/. 4B and 8B use the same decoder.",
                )
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="The UNet; a native MODEL. Its conditioning comes from BLIP3-o Embedding to Conditioning, "
                    "its sigmas from BLIP3-o Scheduler (stage: picture).",
                ),
                io.Vae.Output(display_name="vae", tooltip="The decoder's VAE; a native VAE for VAE Decode."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, decoder: str) -> str:
        return folders.fingerprint(folders.resolve(decoder))

    @classmethod
    def execute(cls, decoder: str) -> io.NodeOutput:
        opened = SdxlDecoderCheckpoint.open(folders.resolve(decoder))
        return io.NodeOutput(loading.load_sdxl_unet(opened), loading.load_sdxl_vae(opened))


class Blip3oVisionEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oVisionEncoderLoader",
            display_name="Load BLIP3-o Vision Encoder",
            category="BLIP3-o/loaders",
            description="Opens the EVA-CLIP tower that turns a picture into the embedding that BLIP3-o samples and draws: for "
            "reconstruction, variations and mixing. Asking about a picture does not need it.",
            search_aliases=["EVA-CLIP", "BLIP3o CLIP vision", "gen_vision_tower"],
            inputs=[
                io.Combo.Input(
                    "vision_encoder",
                    options=folders.list_vision_encoders(),
                    tooltip="A BLIP3-o checkpoint, which holds the tower (8.7 GB), the folder of its own repository "
                    "(eva_clip_vision_tower) under models/blip3o, or a safetensors file in models/clip_vision.",
                )
            ],
            outputs=[io_types.VisionEncoder.Output(display_name="vision_encoder", tooltip="EVA-CLIP; for BLIP3-o Image Encode.")],
        )

    @classmethod
    def fingerprint_inputs(cls, vision_encoder: str) -> str:
        return folders.fingerprint(folders.resolve_vision_encoder(vision_encoder))

    @classmethod
    def execute(cls, vision_encoder: str) -> io.NodeOutput:
        path = folders.resolve_vision_encoder(vision_encoder)
        source = Blip3oCheckpoint.open(path).vision_encoder_source() if folders.is_checkpoint(path) else EvaClipCheckpoint.open(path)
        return io.NodeOutput(loading.load_vision_encoder(source))
