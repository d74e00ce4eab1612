"""The SigLIP2 + SANA decoder, in both published layouts: one set of shards with encoder, connector, transformer and DC-AE.

Sizes come from `submodel_configs.json`, or a `config.json` in the folder of each part, or are the published ones; nothing is downloaded.
"""

import logging
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
from ..models.sana import POSITIONS, SCHEDULERS, Connector, PositionedPatches, SanaDecoder, vae_factor
from ..models.siglip2 import Siglip2, Siglip2Config
from ..sampling.dpm_solver import FLOW_SHIFT

log = logging.getLogger(__name__)

MODEL_TYPES = ("encoder", "diffusion_decoder")
"""Of config.json, one per layout."""
STEM = "model"
SUBMODELS = "submodel_configs.json"
LAYOUTS: dict[str, dict[str, str]] = {
    "siglip2_sana": {
        "encoder": "encoder.model.vision_model.", "connector": "transformer.connector.", "transformer": "transformer.transformer.",
        "vae": "vae.",
    },
    "reconstruction": {
        "encoder": "encoder.vision_model.", "connector": "connector.", "transformer": "transformer.", "vae": "vae.",
    },
}  # fmt: skip
"""Layout -> part -> prefix of its tensors."""
SCHEDULER_OF = {"siglip2_sana": "dpmsolver++", "reconstruction": "euler"}
STEPS, GUIDANCE_SCALE = 30, 3.0  # of the reference
MAX_SIDE = 16384  # of a grid or a picture
VAE_ENCODER_PREFIX = "encoder."  # not needed to turn latents into pixels

_PARTS = {"encoder": "siglip_vision", "transformer": "sana_transformer", "vae": "autoencoder_dc", "scheduler": "scheduler"}
"""Part -> its key in submodel_configs.json."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "encoder": {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 16,
        "image_size": 512, "layer_norm_eps": 1e-6,
    },
    "transformer": {
        "in_channels": 32, "out_channels": 32, "num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20,
        "num_cross_attention_heads": 20, "cross_attention_head_dim": 112, "cross_attention_dim": 2240, "caption_channels": 2304,
        "mlp_ratio": 2.5, "sample_size": 16, "patch_size": 1,
    },
    "vae": {
        "in_channels": 3, "latent_channels": 32, "attention_head_dim": 32,
        "encoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "decoder_block_types": ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024], "decoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "encoder_layers_per_block": [2, 2, 2, 3, 3, 3], "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
        "encoder_qkv_multiscales": [[], [], [], [5], [5], [5]], "decoder_qkv_multiscales": [[], [], [], [5], [5], [5]],
        "upsample_block_type": "interpolate", "downsample_block_type": "conv", "decoder_norm_types": "rms_norm",
        "decoder_act_fns": "silu", "scaling_factor": 0.41407,
    },
    "scheduler": {"flow_shift": FLOW_SHIFT},
}  # fmt: skip
"""SigLIP2 so400m (patch 16, 512 px), SANA 1600M (512 px) and DC-AE f32c32."""
_ENCODER_FIELDS = {
    "hidden_size": "width", "intermediate_size": "mlp_dim", "num_hidden_layers": "layers", "num_attention_heads": "heads",
    "patch_size": "patch_size", "image_size": "image_size", "layer_norm_eps": "layer_norm_eps",
}  # fmt: skip


def is_sana_decoder(folder: Path) -> bool:
    """Whether the folder's config.json says so; its tensors are not looked at."""
    try:
        return read_table(folder / "config.json").get("model_type") in MODEL_TYPES
    except CheckpointError:
        return False


@dataclass(frozen=True)
class SanaDecoderCheckpoint:
    """An opened decoder: configurations and headers are read and checked, no tensor is.

    Attributes: `layout` of LAYOUTS; `parts`: tensors of encoder (without what is unused), connector, transformer and vae, by name in
    the module; `positions` of POSITIONS; `scheduler` of SCHEDULERS.
    """

    folder: Path
    layout: str
    configs: Mapping[str, Mapping[str, Any]]
    parts: Mapping[str, dict[str, TensorEntry]]
    positions: str
    scheduler: str

    @classmethod
    def open(cls, folder: str | Path, *, positions: str | None = None, scheduler: str | None = None) -> "SanaDecoderCheckpoint":
        """Opens a folder with config.json and model*.safetensors.

        Args:
            positions: "sincos" adds the position table that diffusers 0.32 added, "none" doesn't; None: as `interpolation_scale` of the
                transformer's configuration says, else sincos, with which the reference was run.
            scheduler: None takes that of the layout: dpmsolver++ for SigLIP2_SANA, euler for the reconstruction code.
        Raises: CheckpointError if it is no such decoder, incomplete or damaged; InputError for an unknown switch.
        """
        for name, value, known in (("positions", positions, POSITIONS), ("scheduler", scheduler, SCHEDULERS)):
            if value not in (None, *known):
                raise InputError(f"{name} {value!r} of a SANA decoder is unknown. Use one of {', '.join(known)}.")
        folder = Path(os.path.expanduser(folder))
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder. A SANA decoder is a folder with config.json and "
                                  "model*.safetensors.")
        entries = open_shards(folder, STEM)
        layout = next((name for name, prefixes in LAYOUTS.items() if all(_holds(entries, prefix) for prefix in prefixes.values())), None)
        if layout is None:
            raise CheckpointError(f"{folder}: no SigLIP2 + SANA decoder; encoder, connector, transformer and vae are not all in its "
                                  f"tensors (first {min(entries, default='none')}). Download the whole repository again.")
        configs = {part: _read_config(folder, part) for part in _PARTS}
        if positions is None:
            told = configs["transformer"].get("interpolation_scale", 1)
            positions = "none" if told is None else "sincos"
        parts = {part: _without_prefix(entries, prefix) for part, prefix in LAYOUTS[layout].items()}
        checkpoint = cls(folder, layout, configs, parts, positions, scheduler or SCHEDULER_OF[layout])
        checkpoint._require_sensible_settings()
        parts["encoder"] = checkpoint._used_encoder_entries()
        for part, make in (("encoder", checkpoint.empty_encoder), ("connector", checkpoint.empty_connector),
                           ("transformer", checkpoint.empty_transformer), ("vae", checkpoint.empty_vae)):  # fmt: skip
            with sensible(f"decoder's {part}", folder):
                expected = expected_shapes(make())
            require_matching(f"SANA decoder's {part}", folder, expected, parts[part])
        return checkpoint

    has_encoder = True
    """Whether it brings the network that makes its embeddings."""

    @property
    def embedding_width(self) -> int:
        """C of the embeddings this decoder reads."""
        return self.configs["encoder"]["hidden_size"]

    @property
    def reads(self) -> str:
        """Which embeddings it understands, for messages."""
        return f"this SANA decoder draws SigLIP2 embeddings of width {self.embedding_width}, as its own encoder makes them"

    @property
    def components(self) -> dict[str, dict[str, TensorEntry]]:
        """What it consists of, under names for tables."""
        return {f"decoder_{part}": entries for part, entries in self.parts.items()}

    @property
    def own_settings(self) -> dict[str, Any]:
        """Of DrawingDefaults, in place of the model's: the reference's."""
        return {"decoder_steps": STEPS, "decoder_guidance_scale": GUIDANCE_SCALE, "width": self.side, "height": self.side}

    @property
    def caption_width(self) -> int:
        """Of what the connector makes of them."""
        return self.configs["transformer"]["caption_channels"]

    @property
    def factor(self) -> int:
        """Pixels per latent cell, along each axis."""
        return vae_factor(self.configs["vae"])

    @property
    def latent_channels(self) -> int:
        return self.configs["transformer"]["in_channels"]

    @property
    def side(self) -> int:
        """Of the pictures that it was trained on, in pixels."""
        return self.configs["transformer"]["sample_size"] * self.factor

    @property
    def flow_shift(self) -> float:
        """Of the schedule of dpmsolver++."""
        return float(self.configs["scheduler"].get("flow_shift", FLOW_SHIFT))

    @property
    def encoder_config(self) -> Siglip2Config:
        config = self.configs["encoder"]
        return Siglip2Config(**{name: config[field] for field, name in _ENCODER_FIELDS.items()})

    def load(
        self, *, dtype: torch.dtype, device: torch.device | str = "cpu", on_load: OnLoad | None = None, stream: bool = False
    ) -> SanaDecoder:
        """Connector, transformer and the decoding half of the DC-AE. float16, in which they overflow, becomes float32 with a warning."""
        if dtype == torch.float16:
            log.warning("%s: SANA and its autoencoder overflow in float16; float32 is used. bfloat16 takes half of that.", self.folder)
            dtype = torch.float32
        connector = self._fill(self.empty_connector(), "connector", dtype, device, on_load, stream)
        transformer = self._fill(self.empty_transformer(), "transformer", dtype, device, on_load, stream)
        vae = self.load_vae(dtype=dtype, device=device, on_load=on_load, encoder=False, stream=stream)
        return SanaDecoder(connector, transformer, vae, scheduler=self.scheduler, flow_shift=self.flow_shift)

    def load_vae(
        self, *, dtype: torch.dtype | None, device: torch.device | str = "cpu", on_load: OnLoad | None = None, encoder: bool = True,
        stream: bool = False,
    ):  # fmt: skip
        """diffusers' AutoencoderDC, with or without the half that encodes pictures."""
        vae = self.empty_vae()
        if not encoder:
            del vae.encoder
        return self._fill(vae, "vae", dtype, device, on_load, stream, without=() if encoder else VAE_ENCODER_PREFIX)

    def load_encoder(
        self, *, dtype: torch.dtype | None, device: torch.device | str = "cpu", on_load: OnLoad | None = None, stream: bool = False
    ) -> Siglip2:
        """The SigLIP2 tower up to the state that is used. float16 becomes float32."""
        dtype = torch.float32 if dtype == torch.float16 else dtype
        encoder = self._fill(self.empty_encoder(), "encoder", dtype, device, on_load, stream)
        encoder.dtype = dtype
        return encoder

    def empty_encoder(self) -> Siglip2:
        """On the meta device, like all of these."""
        with torch.device("meta"):
            return Siglip2(self.encoder_config)

    def empty_connector(self) -> Connector:
        with torch.device("meta"):
            return Connector(self.embedding_width, self.caption_width)

    def empty_transformer(self):
        """diffusers' SanaTransformer2DModel of this configuration, its positions as chosen."""
        from diffusers import SanaTransformer2DModel

        config = {**self.configs["transformer"], "interpolation_scale": None}
        with torch.device("meta"):
            transformer = SanaTransformer2DModel.from_config(config)
        transformer.patch_embed = PositionedPatches(transformer.patch_embed.proj, trained_side=config["sample_size"],
                                                    positions=self.positions == "sincos")  # fmt: skip
        return transformer

    def empty_vae(self):
        """diffusers' AutoencoderDC of this configuration, both halves."""
        from diffusers import AutoencoderDC

        with torch.device("meta"):
            return AutoencoderDC.from_config(dict(self.configs["vae"]))

    def _fill(self, module, part: str, dtype, device, on_load: OnLoad | None, stream: bool = False, without: str | tuple[()] = ()):
        entries = {name: entry for name, entry in self.parts[part].items() if not name.startswith(without)}
        return fill(module, entries, component=f"SANA decoder's {part}", source=self.folder, dtype=dtype, device=device, on_load=on_load,
                    stream=stream)  # fmt: skip

    def _require_sensible_settings(self) -> None:
        """Raises CheckpointError for what neither the building of the networks nor their tensors would show."""
        from diffusers import AutoencoderDC, SanaTransformer2DModel

        for part, network in (("encoder", None), ("transformer", SanaTransformer2DModel), ("vae", AutoencoderDC)):
            config, source = self.configs[part], f"{self.folder}, configuration of the {part}"
            require_countable(config, len(self.parts[part]), source)
            if network is not None:
                require_plain(config, network, (*PUBLISHED[part], "interpolation_scale"), source)
            for name, published in PUBLISHED[part].items():
                if type(published) is int:
                    whole(config, name, source, high=MAX_SIDE if name.endswith("_size") else 2**31)
                elif type(published) is float:
                    number(config, name, source, low=1e-9, high=1e6)
        encoder = self.configs["encoder"]
        if encoder["hidden_size"] % encoder["num_attention_heads"]:
            raise CheckpointError(f"{self.folder}, configuration of the encoder: {encoder['num_attention_heads']} heads don't divide a "
                                  f"width of {encoder['hidden_size']}. Take the configuration from the repository of the weights.")
        number(self.configs["scheduler"], "flow_shift", self.folder, low=0.01, high=100)

    def _used_encoder_entries(self) -> dict[str, TensorEntry]:
        unused = (f"encoder.layers.{self.encoder_config.layers - 1}.", "post_layernorm.", "head.")
        return {name: entry for name, entry in self.parts["encoder"].items() if not name.startswith(unused)}


def _holds(entries: Mapping[str, TensorEntry], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in entries)


def _without_prefix(entries: Mapping[str, TensorEntry], prefix: str) -> dict[str, TensorEntry]:
    return {name.removeprefix(prefix): entry for name, entry in entries.items() if name.startswith(prefix)}


def _read_config(folder: Path, part: str) -> dict[str, Any]:
    """Of submodel_configs.json or the part's own file; what these don't say is published."""
    own = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file = folder / SUBMODELS if (folder / SUBMODELS).is_file() else own
    if not file.is_file():
        return dict(PUBLISHED[part])
    config = read_table(file)
    config = config.get(_PARTS[part], {}) if file.name == SUBMODELS else config
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: {_PARTS[part]} is no table of settings. Download it again.")
    return {**PUBLISHED[part], **{name: value for name, value in config.items() if not name.startswith("_")}}
