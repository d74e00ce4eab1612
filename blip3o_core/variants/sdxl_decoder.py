"""The published `diffusion-decoder/` folder: UNet, VAE and scheduler, each loaded by itself.

`model_index.json` names classes that no library has, and the pipeline file beside it is remote code: neither is touched.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.load import OnLoad, expected_shapes, fill
from ..checkpoint.report import require_matching
from ..checkpoint.shards import TensorEntry, open_shards
from ..errors import CheckpointError
from ..models.sdxl import SdxlDecoder, vae_factor

FOLDER_NAME = "diffusion-decoder"
WEIGHTS = "diffusion_pytorch_model"
VARIANTS = ("bf16", "")
VAE_ENCODER_PREFIXES = ("encoder.", "quant_conv.")  # not needed to turn latents into pixels


def find_sdxl_decoder(folder: Path) -> Path | None:
    """`folder` itself or its `diffusion-decoder/`, whichever holds a UNet; None if neither does."""
    for candidate in (folder, folder / FOLDER_NAME):
        if (candidate / "unet" / "config.json").is_file():
            return candidate
    return None


@dataclass(frozen=True)
class SdxlDecoderCheckpoint:
    """An opened decoder folder: configurations and headers are read and checked, no tensor is."""

    folder: Path
    unet_config: Mapping[str, Any]
    vae_config: Mapping[str, Any]
    scheduler_config: Mapping[str, Any]
    unet: dict[str, TensorEntry]
    vae: dict[str, TensorEntry]

    @classmethod
    def open(cls, folder: str | Path) -> "SdxlDecoderCheckpoint":
        """Raises CheckpointError if `folder` (or its `diffusion-decoder/`) is no complete decoder for CLIP embeddings."""
        given = Path(os.path.expanduser(folder))
        if given.is_file():
            raise CheckpointError(f"{given}: a single file, but the decoder is a folder with unet/, vae/ and scheduler/.")
        found = find_sdxl_decoder(given)
        if found is None:
            raise CheckpointError(f"{given}: no diffusion decoder here (unet/, vae/ and scheduler/, usually in "
                                  f"{FOLDER_NAME}/). Fine-tuned checkpoints come without: take that of any published model.")
        checkpoint = cls(
            folder=found,
            unet_config=_read_config(found / "unet" / "config.json", "UNet2DConditionModel"),
            vae_config=_read_config(found / "vae" / "config.json", "AutoencoderKL"),
            scheduler_config=_read_config(found / "scheduler" / "scheduler_config.json", "EulerDiscreteScheduler"),
            unet=open_shards(found / "unet", WEIGHTS, VARIANTS),
            vae=open_shards(found / "vae", WEIGHTS, VARIANTS),
        )
        checkpoint._require_embedding_condition()
        require_matching("decoder's UNet", found / "unet", expected_shapes(checkpoint.empty_unet()), checkpoint.unet)
        require_matching("decoder's VAE", found / "vae", expected_shapes(checkpoint.empty_vae()), checkpoint.vae)
        return checkpoint

    has_encoder = False
    """Whether it brings the network that makes its embeddings."""

    @property
    def embedding_width(self) -> int:
        """C of the embeddings this decoder reads."""
        return self.unet_config["cross_attention_dim"]

    @property
    def reads(self) -> str:
        """Which embeddings it understands, for messages."""
        return f"this SDXL decoder draws EVA-CLIP embeddings of width {self.embedding_width}"

    @property
    def components(self) -> dict[str, dict[str, TensorEntry]]:
        """What it consists of, under names for tables."""
        return {"decoder_unet": self.unet, "decoder_vae": self.vae}

    @property
    def latent_channels(self) -> int:
        return self.unet_config["in_channels"]

    @property
    def own_settings(self) -> dict[str, Any]:
        """Of DrawingDefaults, in place of the model's: none."""
        return {}

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each axis."""
        return vae_factor(self.vae_config)

    @property
    def vae_decoder_entries(self) -> dict[str, TensorEntry]:
        """The tensors that turn latents into pixels."""
        return {name: entry for name, entry in self.vae.items() if not name.startswith(VAE_ENCODER_PREFIXES)}

    def load(
        self, *, dtype: torch.dtype, device: torch.device | str = "cpu", on_load: OnLoad | None = None, stream: bool = False
    ) -> SdxlDecoder:
        """UNet and the decoding half of the VAE. The VAE overflows in float16 and is then kept in float32."""
        unet = fill(self.empty_unet(), self.unet, component="decoder's UNet", source=self.folder / "unet",
                    dtype=dtype, device=device, on_load=on_load, stream=stream)  # fmt: skip
        vae = self.empty_vae()
        del vae.encoder
        vae.quant_conv = None
        vae = fill(vae, self.vae_decoder_entries, component="decoder's VAE", source=self.folder / "vae",
                   dtype=torch.float32 if dtype == torch.float16 else dtype, device=device, on_load=on_load,
                   stream=stream)  # fmt: skip
        return SdxlDecoder(unet, vae, self.scheduler_config)

    def empty_unet(self):
        """diffusers' UNet2DConditionModel of this configuration, on the meta device."""
        from diffusers import UNet2DConditionModel

        with torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(self.unet_config))

    def empty_vae(self):
        """diffusers' AutoencoderKL of this configuration, both halves, on the meta device."""
        from diffusers import AutoencoderKL

        with torch.device("meta"):
            return AutoencoderKL.from_config(dict(self.vae_config))

    def _require_embedding_condition(self) -> None:
        config = self.unet_config
        try:
            width, per_id = config["cross_attention_dim"], config["addition_time_embed_dim"]
            fits = (config["addition_embed_type"] == "text_time" and isinstance(width, int)
                    and config["projection_class_embeddings_input_dim"] == width + 6 * per_id)
        except (KeyError, TypeError):
            fits, width = False, None
        if not fits:
            raise CheckpointError(f"{self.folder / 'unet'}: not a decoder for CLIP embeddings: the pooled condition must have "
                                  f"the width of the context ({width}). A plain SDXL UNet can't stand in for it.")


def _read_config(path: Path, class_name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text("utf-8"))
        found = config.get("_class_name")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing. Download the whole {FOLDER_NAME}/ folder.") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, AttributeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Download it again.") from error
    if found != class_name:
        raise CheckpointError(f"{path}: describes {found!r}, expected {class_name}. This is not BLIP3-o's SDXL decoder.")
    return config
