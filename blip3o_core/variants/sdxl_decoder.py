"""The published `diffusion-decoder/` folder: UNet, VAE and scheduler, each loaded by itself.

`model_index.json` names classes that no library has, and the pipeline file beside it is remote code: neither is touched.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.json_files import read_table
from ..checkpoint.load import OnLoad, expected_shapes, fill
from ..checkpoint.report import require_matching
from ..checkpoint.settings import number, require_countable, require_plain, sensible, whole
from ..checkpoint.shards import TensorEntry, open_shards
from ..errors import CheckpointError, InputError
from ..models.sdxl import FEWER_STEPS, SCHEDULERS, SdxlDecoder, vae_factor

FOLDER_NAME = "diffusion-decoder"
WEIGHTS = "diffusion_pytorch_model"
VARIANTS = ("bf16", "")
UNET_SIZES = (
    "sample_size", "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block",
    "norm_num_groups", "cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads",
    "use_linear_projection", "addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim",
)  # fmt: skip
VAE_SIZES = (
    "in_channels", "out_channels", "down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "latent_channels",
    "norm_num_groups", "sample_size", "scaling_factor", "use_quant_conv", "use_post_quant_conv",
)  # fmt: skip
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "timestep_spacing", "steps_offset")
"""In which decoders differ; all else is as diffusers has it."""
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
    scheduler: str = SCHEDULERS[0]

    @classmethod
    def open(cls, folder: str | Path, *, scheduler: str | None = None) -> "SdxlDecoderCheckpoint":
        """Raises CheckpointError if `folder` (or its `diffusion-decoder/`) is no complete decoder for CLIP embeddings.

        scheduler: "euler" (None), as the reference, or "dpmsolver++", which needs half of its steps. Raises InputError for another.
        """
        if scheduler not in (None, *SCHEDULERS):
            raise InputError(f"the scheduler {scheduler!r} of the decoder is unknown. Use one of {', '.join(SCHEDULERS)}.")
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
            scheduler=scheduler or SCHEDULERS[0],
        )
        checkpoint._require_embedding_condition()
        checkpoint._require_sensible_settings()
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
        """Of DrawingDefaults, in place of the model's."""
        return {"decoder_steps": FEWER_STEPS} if self.scheduler == "dpmsolver++" else {}

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
        return SdxlDecoder(unet, vae, self.scheduler_config, self.scheduler)

    def empty_unet(self):
        """diffusers' UNet2DConditionModel of this configuration, on the meta device."""
        from diffusers import UNet2DConditionModel

        with sensible("decoder's UNet", self.folder / "unet"), torch.device("meta"):
            return UNet2DConditionModel.from_config(dict(self.unet_config))

    def empty_vae(self):
        """diffusers' AutoencoderKL of this configuration, both halves, on the meta device."""
        from diffusers import AutoencoderKL

        with sensible("decoder's VAE", self.folder / "vae"), torch.device("meta"):
            return AutoencoderKL.from_config(dict(self.vae_config))

    def _require_sensible_settings(self) -> None:
        """Raises CheckpointError for what neither the building of the networks nor their tensors would show."""
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel

        unet, vae, scheduler = (self.folder / part for part in ("unet", "vae", "scheduler"))
        require_countable(self.unet_config, len(self.unet), unet)
        require_countable(self.vae_config, len(self.vae), vae)
        require_plain(self.unet_config, UNet2DConditionModel, UNET_SIZES, unet)
        require_plain(self.vae_config, AutoencoderKL, VAE_SIZES, vae)
        number(self.vae_config, "scaling_factor", vae, low=1e-6, high=1e6, default=0.18215)
        require_plain(self.scheduler_config, EulerDiscreteScheduler, SCHEDULE, scheduler)
        whole(self.scheduler_config, "num_train_timesteps", scheduler, high=100_000, default=1000)
        with sensible("decoder's scheduler", scheduler):
            schedule = EulerDiscreteScheduler.from_config(dict(self.scheduler_config))
            schedule.set_timesteps(2)
            if not torch.isfinite(schedule.sigmas).all() or schedule.sigmas[0] <= 0:
                raise ValueError(f"noise levels {schedule.sigmas.tolist()}")

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
    if not path.exists():
        raise CheckpointError(f"{path}: missing. Download the whole {FOLDER_NAME}/ folder.")
    config = read_table(path)
    if config.get("_class_name") != class_name:
        raise CheckpointError(f"{path}: describes {config.get('_class_name')!r}, expected {class_name}. This is not BLIP3-o's SDXL "
                              "decoder.")
    return config
