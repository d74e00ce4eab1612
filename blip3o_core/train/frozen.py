"""Networks that no gradient reaches: loaded on first use, in their own precision, released when the cache holds what they give."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checkpoint.fingerprint import tensors_fingerprint
from ..checkpoint.load import OnLoad, fill
from ..checkpoint.shards import TensorEntry
from ..data.prepare import Example
from ..errors import CheckpointError
from ..models.eva_clip import EvaClip
from ..models.qwen2_5_vl import Backbone, VisionTower
from ..variants.blip3o import Blip3oCheckpoint
from ..variants.eva_clip import EvaClipCheckpoint
from ..variants.sdxl_decoder import SdxlDecoderCheckpoint, find_sdxl_decoder
from .config import ModelOptions
from .cpu_attention import LENGTH_MULTIPLE


@dataclass(frozen=True)
class Sources:
    """Opened checkpoints: headers are read and checked, no tensor is."""

    checkpoint: Blip3oCheckpoint
    vision_encoder: EvaClipCheckpoint | None
    decoder: SdxlDecoderCheckpoint | None

    @classmethod
    def open(cls, options: ModelOptions) -> "Sources":
        """Raises CheckpointError for a folder that is incomplete or doesn't fit the others. EVA-CLIP and decoder may be absent."""
        checkpoint = Blip3oCheckpoint.open(options.path)
        if checkpoint.is_quantised:
            raise CheckpointError(f"{checkpoint.folder}: quantised, which can't be trained. Give the model that it was made from; a LoRA "
                                  "of the diffusion transformer fits both.")
        checkpoint.tokenizer  # noqa: B018 -- a folder without tokenizer fails here
        encoder = decoder = None
        if options.vision_encoder:
            encoder = EvaClipCheckpoint.open(options.vision_encoder)
        elif checkpoint.components["vision_encoder"]:
            encoder = checkpoint.vision_encoder_source()
        if options.decoder or find_sdxl_decoder(checkpoint.folder) is not None:
            decoder = SdxlDecoderCheckpoint.open(options.decoder or checkpoint.folder)
        width = checkpoint.dit_config.in_channels
        for name, found in (("vision_encoder", encoder and encoder.config.width), ("decoder", decoder and decoder.embedding_width)):
            if found and found != width:
                raise CheckpointError(f"model.{name} works with embeddings of width {found}, {checkpoint.folder} with {width}. Use the "
                                      "files of one family.")
        return cls(checkpoint, encoder, decoder)

    def require_vision_encoder(self) -> EvaClipCheckpoint:
        """Raises CheckpointError if there is none."""
        if self.vision_encoder is None:
            raise CheckpointError(f"{self.checkpoint.folder}: holds no EVA-CLIP tower, which training on pictures needs. Name it: "
                                  "model.vision_encoder (repository jiuhai/eva_clip_vision_tower).")
        return self.vision_encoder

    def require_decoder(self) -> SdxlDecoderCheckpoint:
        """Raises CheckpointError if there is none."""
        return self.decoder or SdxlDecoderCheckpoint.open(self.checkpoint.folder)

    @property
    def eva_fingerprint(self) -> str:
        """Of the network that makes embeddings."""
        source = self.require_vision_encoder()
        if source.pickle_file is not None:
            status = source.pickle_file.stat()
            return f"pickle-{status.st_size:x}-{status.st_mtime_ns:x}"
        return tensors_fingerprint(source.entries)

    @property
    def language_fingerprint(self) -> str:
        """Of everything that makes query states."""
        components = self.checkpoint.components
        entries = {name: entry for part in ("language_model", "vision_tower") for name, entry in components[part].items()}
        queries = tensors_fingerprint({name: _flattened(entry) for name, entry in components["queries"].items()})
        return f"{tensors_fingerprint(entries)}-{queries}"


def _flattened(entry: TensorEntry) -> TensorEntry:
    """The queries count as a vector, so that all of them are read: they tell two trainings of one backbone apart."""
    return replace(entry, shape=(entry.numel,))


class FrozenNetworks:
    """EVA-CLIP, backbone, vision tower and VAE as they were published. Everything runs without gradients and without autocast."""

    def __init__(self, sources: Sources, *, device: torch.device, dtype: torch.dtype, on_load: OnLoad | None = None) -> None:
        self.sources, self.device, self.dtype = sources, device, dtype
        self._on_load = on_load
        self._networks: dict[str, torch.nn.Module] = {}
        self._zero_embedding: Tensor | None = None

    @property
    def vision_encoder(self) -> EvaClip:
        """EVA-CLIP. Raises CheckpointError if the files lack it."""
        return self._network("vision_encoder", self.sources.require_vision_encoder().load)

    @property
    def backbone(self) -> Backbone:
        """Language model and queries."""
        return self._network("backbone", self.sources.checkpoint.load_backbone)

    @property
    def vision_tower(self) -> VisionTower:
        """Qwen2.5-VL's eyes."""
        return self._network("vision_tower", self.sources.checkpoint.load_vision_tower)

    @property
    def vae(self):
        """Both halves of the decoder's autoencoder, in float32: its encoder overflows in half precision."""
        decoder = self.sources.require_decoder()

        def load(*, dtype, device, on_load):
            return fill(decoder.empty_vae(), decoder.vae, component="decoder's VAE", source=decoder.folder / "vae",
                        dtype=torch.float32, device=device, on_load=on_load)  # fmt: skip

        return self._network("vae", load)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of what is in memory."""
        return tuple(self._networks)

    def release(self) -> None:
        """Frees all of them; what is needed again is loaded again."""
        self._networks.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def embeddings(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) -> embeddings (B, C, 8, 8) float32."""
        with self._plain():
            return self.vision_encoder(pixels.to(self.device, self.dtype)).float()

    @torch.no_grad()
    def zero_embedding(self) -> Tensor:
        """Embedding of the zero pixel tensor (1, C, 8, 8): what the decoder is guided away from."""
        if self._zero_embedding is None:
            side = self.sources.require_vision_encoder().config.image_size
            self._zero_embedding = self.embeddings(torch.zeros(1, 3, side, side))
        return self._zero_embedding

    @torch.no_grad()
    def image_features(self, examples: Sequence[Example]) -> list[Tensor | None]:
        """Vision features of each example's pictures (n, H), None for those without."""
        with self._plain():
            return image_features(lambda: self.vision_tower, examples, self.device, self.dtype)

    @torch.no_grad()
    def query_states(self, examples: Sequence[Example]) -> Tensor:
        """(B, Q, H) float32."""
        with self._plain():
            return query_states(self.backbone, examples, self.image_features(examples), self.sources.checkpoint.tokenizer.image_pad_id,
                                self.device, self.dtype).float()  # fmt: skip

    @torch.no_grad()
    def latents(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> scaled latents (B, 4, h, w) float32: the mode of the posterior."""
        with self._plain():
            vae = self.vae
            return vae.encode(pictures.to(self.device, vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor

    def _plain(self):
        return torch.autocast(self.device.type, enabled=False)

    def _network(self, name: str, load):
        if name not in self._networks:
            self._networks[name] = load(dtype=self.dtype, device=self.device, on_load=self._on_load)
        return self._networks[name]


def image_features(tower, examples: Sequence[Example], device: torch.device, dtype: torch.dtype) -> list[Tensor | None]:
    """One pass over the pictures of all examples; `tower()` is asked for only if there are any."""
    having = [example for example in examples if example.pixel_values is not None]
    if not having:
        return [None] * len(examples)
    pixels = torch.cat([example.pixel_values for example in having]).to(device, dtype)
    grids = torch.cat([example.grid_thw for example in having]).to(device)
    counts = [int(example.grid_thw.prod(dim=1).sum()) // 4 for example in having]
    features = iter(tower()(pixels, grids).split(counts))
    return [None if example.pixel_values is None else next(features) for example in examples]


def query_states(
    backbone: Backbone, examples: Sequence[Example], features: Sequence[Tensor | None], image_pad_id: int, device: torch.device,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """States of the queries behind each prompt (B, Q, H), positions counted up as in the reference."""
    return backbone([
        backbone.embed(example.ids, device=device, dtype=dtype, image_features=own, image_token_id=image_pad_id)
        for example, own in zip(examples, features, strict=True)
    ], multiple=LENGTH_MULTIPLE)  # fmt: skip
