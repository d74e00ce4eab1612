"""The published BLIP3-o layout (Qwen2.5-VL + NextDiT, 4B, 8B and anything smaller): folder -> components."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.json_files import read_table
from ..checkpoint.load import OnLoad, expected_shapes, fill
from ..checkpoint.report import require_matching
from ..checkpoint.settings import require_countable, sensible
from ..checkpoint.shards import SCALE, TensorEntry, open_shards, read_header, read_tensor
from ..checkpoint.tokenizer_files import require_sensible_ids
from ..errors import CheckpointError, InputError
from ..models.nextdit import NextDiT, NextDiTConfig
from ..models.quantised import adopt_quantised
from ..models.qwen2_5_vl import Backbone, TiedHead, VisionTower, text_config, vision_config
from ..prompts import PromptTokenizer
from ..sampling.solvers import DEFAULT_SOLVER, SOLVERS
from . import split
from .eva_clip import EvaClipCheckpoint

MODEL_TYPES = ("blip3o_qwen", "blip3o_qwen_inference")  # training and inference class; the tensors are the same
SKIPPED = "skipped"
MAX_IMAGE_SIDE = 3584  # 16384 tokens, the most that Qwen's processor makes
NANO_FOLDER = Path(__file__).parents[1] / "nano" / "model"

# prefix in the file -> (component, prefix in the component's module); the first match wins, in both directions
KEY_TABLE: tuple[tuple[str, str, str], ...] = (
    ("model.latent_queries", "queries", "latent_queries"),
    ("model.dit.model.", "dit", ""),
    ("model.gen_vision_tower.vision_tower.model.", "vision_encoder", ""),
    ("model.embed_tokens.", "language_model", "language_model.embed_tokens."),
    ("model.layers.", "language_model", "language_model.layers."),
    ("model.norm.", "language_model", "language_model.norm."),
    ("model.language_model.", "language_model", "language_model."),  # re-saved by transformers >= 4.52
    ("visual.", "vision_tower", "network."),
    ("model.visual.", "vision_tower", "network."),
    ("lm_head.", "output_head", ""),
    ("model.vae.", SKIPPED, ""),  # a FLUX autoencoder that early training scripts attached; no path uses it
    ("model.down_projector.", SKIPPED, ""),
    ("model.noise_scheduler.", SKIPPED, ""),
    ("model.mm_projector.", SKIPPED, ""),
    ("model.gen_projector.", SKIPPED, ""),
)

TASKS: dict[str, tuple[str, ...]] = {
    "text to image": ("language_model", "queries", "dit"),
    "image-conditioned generation": ("language_model", "queries", "dit", "vision_tower"),
    "understanding": ("language_model", "output_head", "vision_tower"),
    "reconstruction": ("vision_encoder",),
}
"""Components of the root shards per task; all but understanding also load the decoder."""

@dataclass(frozen=True, kw_only=True)
class DrawingDefaults:
    """Settings of both stages. Those of the decoder and the guidance are the reference's; the reference's solver is euler with 30 steps."""

    solver: str = DEFAULT_SOLVER
    steps: int = SOLVERS[DEFAULT_SOLVER].steps
    guidance_scale: float = 3.0
    decoder_steps: int = 50
    decoder_guidance_scale: float = 3.0
    width: int = 1024
    height: int = 1024


Components = dict[str, dict[str, TensorEntry]]


@dataclass(frozen=True)
class Blip3oCheckpoint:
    """An opened folder: configuration and headers are read and checked, no tensor is."""

    folder: Path
    config: Mapping[str, Any]
    components: Components  # component -> name in its module -> where it lies
    qwen: Path | None = None  # where the backbone of a split was taken from

    @classmethod
    def open(cls, folder: str | Path, *, qwen: str | Path | None = None) -> "Blip3oCheckpoint":
        """Raises CheckpointError if `folder` is not a complete BLIP3-o checkpoint; says what it looks like instead.

        qwen: the folder, or the single file, of Qwen2.5-VL-Instruct that a split (`variants.split`) takes its backbone from; nothing
            else may have one.

        "nano" is the small model in this package, unless there is a checkpoint of that name.
        """
        folder = Path(os.path.expanduser(folder))
        if str(folder) == "nano" and not (folder / "config.json").exists():
            folder = NANO_FOLDER
        config = read_config(folder)
        entries = open_shards(folder, "model")
        rows = {name: entries.pop(name) for name in (split.EMBED_ROWS, split.HEAD_ROWS) if name in entries}
        components = split_components(entries, folder)
        if split.KEY in config:
            if qwen is None:
                raise CheckpointError(f"{folder}: a split, which holds queries and diffusion transformer alone. Also give the folder of "
                                      "its Qwen2.5-VL-Instruct: --qwen (in Python qwen=, in ComfyUI the loader's input qwen).")
            qwen = Path(os.path.expanduser(qwen))
            base = split_components(read_header(qwen) if qwen.is_file() else open_shards(qwen, "model"), qwen)
            components = split.joined(components, rows, config, base, folder, qwen)
        elif qwen is not None:
            raise InputError(f"{folder} has a backbone of its own and is no split. Leave qwen out.")
        absent = [name for name in TASKS["text to image"] if not components.get(name)]
        if absent:
            raise CheckpointError(f"{folder}: config.json says {config['model_type']}, but the weights hold no tensor of: "
                                  f"{', '.join(absent)}. Download the complete BLIP3-o repository.")
        checkpoint = cls(folder, config, components, qwen)
        checkpoint.drawing, checkpoint.image_side  # noqa: B018 -- wrong settings are found here
        encoder, dit = checkpoint._empty_backbone(), checkpoint._empty_dit()
        require_matching("language backbone", folder, expected_shapes(encoder), checkpoint._backbone_entries)
        require_matching("diffusion transformer", folder, expected_shapes(dit), components["dit"])
        if checkpoint.dit_config.context_dim != encoder.language_model.config.hidden_size:
            raise CheckpointError(f"{folder}: the diffusion transformer reads states of width "
                                  f"{checkpoint.dit_config.context_dim}, the backbone has "
                                  f"{encoder.language_model.config.hidden_size}. The shards come from different models.")
        return checkpoint

    @cached_property
    def text_config(self):
        """`Qwen2_5_VLTextConfig` of the backbone."""
        return text_config(self.config, self.folder / "config.json")

    @cached_property
    def dit_config(self) -> NextDiTConfig:
        """Sizes of the diffusion transformer, read off its tensors."""
        return NextDiTConfig.from_shapes({name: e.shape for name, e in self.components["dit"].items()}, self.folder)

    @cached_property
    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer beside the weights, checked for BLIP3-o's special tokens."""
        require_sensible_ids(self.folder)
        return PromptTokenizer(self.folder)

    @property
    def num_queries(self) -> int:
        """Learned queries: 64 in every published model."""
        shape = self.components["queries"]["latent_queries"].shape
        if len(shape) != 3:
            raise CheckpointError(f"{self.folder}: model.latent_queries is {list(shape)}, expected [1, queries, width].")
        return shape[1]

    @property
    def image_side(self) -> int | None:
        """Side in pixels of the squares that this model's eyes were trained on; None for published models, which take any size.

        A key of ours in config.json (`image_side`). Raises CheckpointError if it is no multiple of 28.
        """
        side = self.config.get("image_side")
        if side is not None and (not isinstance(side, int) or not 28 <= side <= MAX_IMAGE_SIDE or side % 28):
            raise CheckpointError(f"{self.folder / 'config.json'}: image_side is {side!r:.60}, not a multiple of 28 pixels up to "
                                  f"{MAX_IMAGE_SIDE}.")
        return side

    @cached_property
    def drawing(self) -> "DrawingDefaults":
        """What to draw with unless somebody says otherwise: the reference's settings, or those of config.json (`drawing`, a key of ours).

        Raises CheckpointError for an unknown setting.
        """
        settings = self.config.get("drawing", {})
        if not isinstance(settings, dict):
            raise CheckpointError(f"{self.folder / 'config.json'}: drawing is {settings!r:.60}, not a table of settings.")
        known = {field.name: field.type for field in fields(DrawingDefaults)}
        for name, value in settings.items():
            if name == "solver":
                sensible = isinstance(value, str) and value in SOLVERS
            else:
                sensible = name in known and isinstance(value, int if known[name] is int else int | float) and value > 0
            if not sensible:
                raise CheckpointError(f"{self.folder / 'config.json'}: drawing.{name} = {value!r} makes no sense. Known are "
                                      f"{', '.join(known)}.")
        return DrawingDefaults(**settings)

    @property
    def is_quantised(self) -> bool:
        """Whether the language model is stored in 8 or 4 bits."""
        return any(name.endswith(f".{SCALE}") for name in self.components["language_model"])

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that tell base models apart: what a LoRA was trained on. Reads a few small tensors.

        Hashed are the shapes of the diffusion transformer, the learned queries and its vectors in bfloat16, none of which
        quantisation touches: a copy in another precision keeps its fingerprint.
        """
        digest = hashlib.sha256()
        read = {"latent_queries": self.components["queries"]["latent_queries"]}
        for name, entry in sorted(self.components["dit"].items()):
            digest.update(f"{name} {list(entry.shape)}\n".encode())
            if len(entry.shape) == 1:
                read[name] = entry
        for name, entry in sorted(read.items()):
            digest.update(f"{name} {list(entry.shape)}\n".encode())
            digest.update(read_tensor(entry, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def load_backbone(
        self, *, dtype: torch.dtype | None, device: torch.device | str = "cpu", on_load: OnLoad | None = None,
        stream: bool = False,
    ) -> Backbone:
        """Language model without output head, and the queries; nothing else is read."""
        encoder = fill(self._empty_backbone(), self._backbone_entries, component="language backbone", source=self.folder,
                       dtype=dtype, device=device, on_load=on_load, stream=stream)  # fmt: skip
        encoder.rebuild_rotary_table()
        return encoder

    def load_vision_tower(
        self, *, dtype: torch.dtype | None, device: torch.device | str = "cpu", on_load: OnLoad | None = None,
        stream: bool = False,
    ) -> VisionTower:
        """The understanding encoder. Raises CheckpointError if the shards were saved without it."""
        if not self.components["vision_tower"]:
            raise CheckpointError(f"{self.folder}: the shards hold no vision tower (visual.*), so images can't be read. "
                                  "Download the complete BLIP3-o repository.")
        config = vision_config(self.config, self.folder / "config.json")
        require_countable({"depth": config.depth}, len(self.components["vision_tower"]), self.folder / "config.json")
        with sensible("vision tower", self.folder / "config.json"):
            tower = VisionTower.empty(config)
        fill(tower, self.components["vision_tower"], component="vision tower", source=self.folder,
             dtype=dtype, device=device, on_load=on_load, stream=stream)  # fmt: skip
        tower.rebuild_rotary_table()
        return tower

    def load_output_head(
        self, backbone: Backbone, *, dtype: torch.dtype | None, device: torch.device | str = "cpu", on_load: OnLoad | None = None,
        stream: bool = False,
    ) -> nn.Module:
        """States -> logits. Models with tied embeddings share the matrix of `backbone`; nothing is read then.

        Raises CheckpointError if an untied model comes without the head.
        """
        if self.components["output_head"]:
            with torch.device("meta"):
                head = nn.Linear(self.text_config.hidden_size, self.text_config.vocab_size, bias=False)
            adopt_quantised(head, self.components["output_head"], self.folder)
            return fill(head, self.components["output_head"], component="output head", source=self.folder,
                        dtype=dtype, device=device, on_load=on_load, stream=stream)  # fmt: skip
        if not self.config.get("tie_word_embeddings", False):
            raise CheckpointError(f"{self.folder}: the shards hold no lm_head.weight, which this model needs to write text. "
                                  "Download the complete BLIP3-o repository.")
        return TiedHead(backbone)

    def load_dit(
        self, *, dtype: torch.dtype, device: torch.device | str = "cpu", on_load: OnLoad | None = None, stream: bool = False
    ) -> NextDiT:
        """The diffusion transformer alone."""
        dit = fill(self._empty_dit(), self.components["dit"], component="diffusion transformer", source=self.folder,
                   dtype=dtype, device=device, on_load=on_load, stream=stream)  # fmt: skip
        dit.dtype = dtype
        return dit

    def vision_encoder_source(self) -> EvaClipCheckpoint:
        """The EVA-CLIP tower inside the root shards. Raises CheckpointError if they were saved without it."""
        if not self.components["vision_encoder"]:
            raise CheckpointError(f"{self.folder}: the shards hold no EVA-CLIP tower, which turns images into embeddings. Give it "
                                  "separately (repository jiuhai/eva_clip_vision_tower).")
        overrides = self.config.get("gen_vision_config")  # ours: published models have heads of width 112 and no such field
        if not isinstance(overrides or {}, dict):
            raise CheckpointError(f"{self.folder / 'config.json'}: gen_vision_config is {overrides!r:.60}, not a table.")
        return EvaClipCheckpoint.from_entries(self.components["vision_encoder"], self.folder, overrides=overrides)

    @property
    def _backbone_entries(self) -> dict[str, TensorEntry]:
        return {**self.components["language_model"], **self.components["queries"]}

    def _empty_backbone(self) -> Backbone:
        layers = {"num_hidden_layers": self.text_config.num_hidden_layers}
        require_countable(layers, len(self.components["language_model"]), self.folder / "config.json")
        with sensible("language backbone", self.folder / "config.json"):
            empty = Backbone.empty(self.text_config, self.num_queries)
        return adopt_quantised(empty, self._backbone_entries, self.folder)

    def _empty_dit(self) -> NextDiT:
        with torch.device("meta"):
            return NextDiT(self.dit_config)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a BLIP3-o folder; raises CheckpointError that tells what else `folder` may be."""
    if folder.is_file():
        raise CheckpointError(f"{folder}: a single file, but a BLIP3-o checkpoint is a folder with config.json, tokenizer "
                              "and shards. Give the folder.")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder. Give the folder that holds config.json and the shards.")
    if not (folder / "config.json").is_file():
        kind = "a diffusers pipeline" if (folder / "model_index.json").is_file() else "no checkpoint that this package knows"
        raise CheckpointError(f"{folder}: has no config.json; it is {kind}. Give the BLIP3-o folder itself.")
    config = read_table(folder / "config.json")
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        hint = ("This is the base model, which can't draw: download BLIP3o/BLIP3o-Model-4B or -8B."
                if str(model_type).startswith("qwen") else "Give the folder of BLIP3o-Model-4B or -8B.")
        raise CheckpointError(f"{folder / 'config.json'}: model_type is {model_type!r}, not one of {', '.join(MODEL_TYPES)}. {hint}")
    return config


def published_name(component: str, name: str) -> str:
    """What the tensor `name` of a component's module is called in the published files."""
    return next(prefix + name.removeprefix(target) for prefix, owner, target in KEY_TABLE if owner == component and name.startswith(target))


def split_components(entries: Mapping[str, TensorEntry], source: Path) -> Components:
    """Sorts tensors by KEY_TABLE; raises CheckpointError that lists every name the table doesn't know."""
    components: Components = {component: {} for _, component, _ in KEY_TABLE}
    unknown = []
    for name, entry in entries.items():
        for prefix, component, target in KEY_TABLE:
            if name.startswith(prefix):
                components[component][target + name[len(prefix) :]] = entry
                break
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(f"{source}: holds {len(unknown)} tensors that no BLIP3-o model has, first "
                              f"{', '.join(sorted(unknown)[:5])}. This is another model, or a file that was merged by hand.")
    return components
