"""The one list of nodes."""

from comfy_api.v0_0_2 import ComfyExtension, io

from .adapters.folders import register_folders
from .conditioning import Blip3oEmbeddingToConditioning, Blip3oTextEncode
from .embeddings import Blip3oEmbeddingPreview, Blip3oEmptyEmbedding, Blip3oImageEncode, Blip3oMixEmbeddings
from .loaders import Blip3oCheckpointLoader, Blip3oSANADecoderLoader, Blip3oSDXLDecoderLoader, Blip3oVisionEncoderLoader
from .lora import Blip3oLoraLoader
from .sampling import Blip3oScheduler
from .understanding import Blip3oAsk, Blip3oChat


class Blip3oExtension(ComfyExtension):
    """What the host asks for after import."""

    async def on_load(self) -> None:
        register_folders()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            Blip3oCheckpointLoader,
            Blip3oLoraLoader,
            Blip3oVisionEncoderLoader,
            Blip3oTextEncode,
            Blip3oEmptyEmbedding,
            Blip3oImageEncode,
            Blip3oMixEmbeddings,
            Blip3oEmbeddingPreview,
            Blip3oScheduler,
            Blip3oSDXLDecoderLoader,
            Blip3oSANADecoderLoader,
            Blip3oEmbeddingToConditioning,
            Blip3oAsk,
            Blip3oChat,
        ]


async def comfy_entrypoint() -> Blip3oExtension:
    return Blip3oExtension()
