"""Picked folder -> backbone, MODEL, VAE."""

from comfy_api.v0_0_2 import io

from ..blip3o_core.models.sana import POSITIONS, SCHEDULERS
from ..blip3o_core.variants.blip3o import Blip3oCheckpoint
from ..blip3o_core.variants.eva_clip import EvaClipCheckpoint
from ..blip3o_core.variants.sana_decoder import SanaDecoderCheckpoint, is_sana_decoder
from ..blip3o_core.variants.sdxl_decoder import SdxlDecoderCheckpoint
from .adapters import folders, io_types, loading
from .adapters.memory import CLOSE_OTHERS, FEWER_BITS, memory_advice

AUTOMATIC = "automatic"
INSIDE = "inside the checkpoint"


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
                ),
                io.Combo.Input(
                    "qwen", options=[INSIDE, *folders.list_qwen()], default=INSIDE, optional=True, advanced=True,
                    tooltip="Where the language model is. A split checkpoint (blip3o split) holds none and takes that of a "
                    "Qwen2.5-VL-Instruct: a folder under models/blip3o, or a file in models/text_encoders with qwen in its name, in its "
                    "original precision.",
                ),
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
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, checkpoint: str | None = None) -> bool | str:
        # not qwen too: the host marks every input that is named here when one of them is wrong
        return folders.is_offered(checkpoint, folders.list_checkpoints())

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, qwen: str = INSIDE) -> str:
        own = folders.fingerprint(folders.resolve(checkpoint))
        return own if qwen == INSIDE else f"{own};{folders.fingerprint(folders.resolve_qwen(qwen))}"

    @classmethod
    def execute(cls, checkpoint: str, qwen: str = INSIDE) -> io.NodeOutput:
        with memory_advice("opening the model", f"{CLOSE_OTHERS} {FEWER_BITS}"):
            opened = Blip3oCheckpoint.open(folders.resolve(checkpoint), qwen=None if qwen == INSIDE else folders.resolve_qwen(qwen))
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
    def validate_inputs(cls, decoder: str | None = None) -> bool | str:
        return folders.is_offered(decoder, folders.list_sdxl_decoders())

    @classmethod
    def fingerprint_inputs(cls, decoder: str) -> str:
        return folders.fingerprint(folders.resolve(decoder))

    @classmethod
    def execute(cls, decoder: str) -> io.NodeOutput:
        with memory_advice("opening the model", CLOSE_OTHERS):
            opened = SdxlDecoderCheckpoint.open(folders.resolve(decoder))
            return io.NodeOutput(loading.load_sdxl_unet(opened), loading.load_sdxl_vae(opened))


class Blip3oSANADecoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oSANADecoderLoader",
            display_name="Load BLIP3-o SANA Decoder",
            category="BLIP3-o/loaders",
            description="Opens a SigLIP2 + SANA decoder: a diffusion transformer that draws what a SigLIP2 embedding says, and its "
            "autoencoder (DC-AE). Embeddings of the 4B and 8B models are EVA-CLIP's: those need the SDXL decoder.",
            search_aliases=["BLIP3o SANA", "SigLIP2_SANA", "DC-AE"],
            inputs=[
                io.Combo.Input(
                    "decoder",
                    options=folders.list_sana_decoders(),
                    tooltip="Folder under models/blip3o with config.json and model*.safetensors of SigLIP2_SANA or of the later "
                    "reconstruction code.",
                ),
                io.Combo.Input(
                    "positions", options=[AUTOMATIC, *POSITIONS], default=AUTOMATIC, advanced=True,
                    tooltip="Position table of SANA, which the file doesn't tell: automatic takes sincos unless the configuration says "
                    "otherwise. Try none if pictures come out scrambled.",
                ),
                io.Combo.Input(
                    "scheduler", options=[AUTOMATIC, *SCHEDULERS], default=AUTOMATIC, advanced=True,
                    tooltip="What the model's sigmas and timesteps are made for: automatic is dpmsolver++ for SigLIP2_SANA (shift 3, whole "
                    "timesteps) and euler for the reconstruction code (no shift).",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="Connector and SANA; a native MODEL. Its conditioning comes from BLIP3-o Embedding to Conditioning, its "
                    "sigmas from BLIP3-o Scheduler (stage: picture (SANA)).",
                ),
                io.Vae.Output(display_name="vae", tooltip="The DC-AE; a native VAE for VAE Decode and VAE Decode (Tiled)."),
            ],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, decoder: str | None = None) -> bool | str:
        return folders.is_offered(decoder, folders.list_sana_decoders())

    @classmethod
    def fingerprint_inputs(cls, decoder: str, positions: str = AUTOMATIC, scheduler: str = AUTOMATIC) -> str:
        return folders.fingerprint(folders.resolve(decoder))

    @classmethod
    def execute(cls, decoder: str, positions: str = AUTOMATIC, scheduler: str = AUTOMATIC) -> io.NodeOutput:
        with memory_advice("opening the model", CLOSE_OTHERS):
            chosen = {name: None if value == AUTOMATIC else value for name, value in (("positions", positions), ("scheduler", scheduler))}
            opened = SanaDecoderCheckpoint.open(folders.resolve(decoder), **chosen)
            return io.NodeOutput(loading.load_sana(opened), loading.load_dcae(opened))


class Blip3oVisionEncoderLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Blip3oVisionEncoderLoader",
            display_name="Load BLIP3-o Vision Encoder",
            category="BLIP3-o/loaders",
            description="Opens the tower that turns a picture into an embedding: EVA-CLIP, whose embeddings BLIP3-o samples and the SDXL "
            "decoder draws, or the SigLIP2 of a SANA decoder. For reconstruction, variations and mixing.",
            search_aliases=["EVA-CLIP", "SigLIP2", "BLIP3o CLIP vision", "gen_vision_tower"],
            inputs=[
                io.Combo.Input(
                    "vision_encoder",
                    options=folders.list_vision_encoders(),
                    tooltip="A BLIP3-o checkpoint, which holds EVA-CLIP (8.7 GB), the folder of its own repository "
                    "(eva_clip_vision_tower) under models/blip3o, a safetensors file in models/clip_vision, or the folder of a SANA "
                    "decoder.",
                )
            ],
            outputs=[io_types.VisionEncoder.Output(display_name="vision_encoder", tooltip="For BLIP3-o Image Encode.")],
        )

    @classmethod
    def validate_inputs(cls, vision_encoder: str | None = None) -> bool | str:
        return folders.is_offered(vision_encoder, folders.list_vision_encoders())

    @classmethod
    def fingerprint_inputs(cls, vision_encoder: str) -> str:
        return folders.fingerprint(folders.resolve_vision_encoder(vision_encoder))

    @classmethod
    def execute(cls, vision_encoder: str) -> io.NodeOutput:
        with memory_advice("opening the model", CLOSE_OTHERS):
            path = folders.resolve_vision_encoder(vision_encoder)
            if is_sana_decoder(path):
                source = SanaDecoderCheckpoint.open(path)
            elif folders.is_checkpoint(path):
                source = Blip3oCheckpoint.open(path).vision_encoder_source()
            else:
                source = EvaClipCheckpoint.open(path)
            return io.NodeOutput(loading.load_vision_encoder(source))
