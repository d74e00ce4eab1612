"""Configuration -> the networks of a run: which are loaded, in which precision, which of their weights train."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..checkpoint.load import OnLoad, fill
from ..data.sample import GENERATION_TASKS, WRITING_TASKS
from ..errors import ConfigError
from ..models.eva_clip import EMBEDDING_GRID
from ..models.qwen2_5_vl import TiedHead
from .adapters import add_adapters, dropout_layers
from .autoencoding import thumbnail_head
from .config import TrainConfig
from .contrastive import TextTower
from .cpu_attention import write_out_attention
from .fresh import start_afresh, start_queries_afresh
from .frozen import FrozenNetworks, Sources
from .model import TrainingModel
from .noise import hashed_seed
from .objectives import TRAINS, build_objectives
from .segmentation import query_label_head, segmentation_head

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

LEARNED_FROM = {"clip": (*GENERATION_TASKS, "decode"), "vae": ("decode",)}
"""Network -> tasks that learn from what it makes, for which it has to hold still."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """auto is bf16 on an accelerator and fp32 on the CPU. Raises ConfigError for fp16 on the CPU."""
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError('train.precision is "fp16", which needs an accelerator; this run is on the CPU. Use "bf16" or "fp32".')
    if precision != "auto":
        return precision
    return "fp32" if device.type == "cpu" else "bf16"


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError if torch.compile, which itself would say so at the first step, lacks what it needs."""
    compiler = os.environ.get("CXX") or {"win32": "cl", "darwin": "clang++"}.get(sys.platform, "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(f"train.compile needs a C++ compiler on the CPU, and there is no {compiler}. Install one (CXX may name it), or "
                          "set train.compile = false.")
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError("train.compile needs triton on CUDA, which is not installed. Install it, or set train.compile = false.")


def frozen_dtype(precision: str) -> torch.dtype:
    """Of networks that only compute: Qwen2.5-VL and the VAE overflow in float16, so fp16 runs keep them in float32."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def require_trainable(config: TrainConfig, tasks: Sequence[str]) -> None:
    """Raises ConfigError if a task reaches nothing that trains, or a part is reached by no task."""
    parts = set(config.trained_parts)
    for task in sorted(set(tasks)):
        if parts.isdisjoint(TRAINS[task]):
            raise ConfigError(f"data with task = {task!r} trains only {', '.join(sorted(TRAINS[task]))}, but this run trains "
                              f"{', '.join(sorted(parts))}. Change the task, or what trains.")
    for part in sorted(parts):
        if not any(part in TRAINS[task] for task in tasks):
            raise ConfigError(f"{part} is to be trained, but no dataset has a task that reaches it: "
                              f"{', '.join(task for task, reached in TRAINS.items() if part in reached)}.")
    for part, learned in LEARNED_FROM.items():
        learning = [task for task in tasks if task in learned]
        if part in parts and learning:
            raise ConfigError(f"{part} can't train in one run with {learning[0]}: its features are what that task learns. Train it "
                              "first.")
    if "segment" in tasks and "clip" in parts and not parts.isdisjoint(("vision", "backbone")):
        raise ConfigError("the task segment teaches either clip or the networks of the backbone, and this run trains both. Train them in "
                          "runs of their own.")
    for name in ("regression_weight", "label_weight"):
        weight = getattr(config.objective, name)
        if weight and not (config.trains_language_side and set(tasks) & set(GENERATION_TASKS)):
            raise ConfigError(f"objective.{name} = {weight:g} teaches queries and language model what to draw, but neither of them trains "
                              "on a drawing task. Set it to 0, or train latent_queries or backbone.")
    if not config.objective.draws_per_sample:
        if parts & {"dit", "decoder"}:
            raise ConfigError("objective.draws_per_sample is 0, with which neither DiT nor decoder learns anything. Give at least 1, or "
                              "don't train them.")
        if set(tasks) & set(GENERATION_TASKS) and not (config.objective.regression_weight or config.objective.label_weight):
            raise ConfigError("objective.draws_per_sample is 0, and so are regression_weight and label_weight: nothing is learned. Set one "
                              "of them.")
    if config.objective.label_weight and any(data.crop != "centre" for data in config.data):
        raise ConfigError("objective.label_weight needs centre crops: labels are those of the whole picture. Set data.crop to centre.")
    if config.objective.changed_weight != 1 and "edit" not in tasks:
        raise ConfigError(f"objective.changed_weight = {config.objective.changed_weight:g} weighs what edits change, but no dataset has "
                          "the task edit. Set it to 1.")
    if "contrast" in tasks and config.train.batch_size < 2:
        raise ConfigError("train.batch_size is 1, but the task contrast tells the pictures of one batch apart. Give at least 2.")
    delicate = bool(parts & {"vae", "vae_decoder"} or set(tasks) & set(WRITING_TASKS)) or config.trains_language_side
    if config.train.precision == "fp16" and delicate:
        raise ConfigError('train.precision is "fp16", in which Qwen2.5-VL and the VAE overflow; here gradients pass through one of them. '
                          'Use "bf16".')


def build_model(
    config: TrainConfig, sources: Sources, frozen: FrozenNetworks, tasks: Sequence[str], *, precision: str, on_load: OnLoad | None = None
) -> TrainingModel:
    """Loads what gradients pass through: trained weights in float32, frozen ones in the precision of the run.

    Raises CheckpointError, ConfigError.
    """
    full = set(config.train.parts) if config.train.method == "full" else set()
    lora = set(config.lora.parts) if config.train.method == "lora" else set()
    device, low = frozen.device, PRECISIONS[precision]
    generating, writing = any(task in GENERATION_TASKS for task in tasks), any(task in WRITING_TASKS for task in tasks)
    source, channels = sources.checkpoint, sources.checkpoint.dit_config.in_channels  # C of an embedding

    def load(loader, part: str, frozen_as: torch.dtype) -> nn.Module:
        network = loader(dtype=torch.float32 if part in full else frozen_as, device=device, on_load=on_load)
        if part in config.train.fresh:
            start_afresh(network, part, config.train.seed)
        return network.requires_grad_(True) if part in full else network

    def seeded(name: str, make: Callable[[], nn.Module]) -> nn.Module:
        """What is thrown away after training, with start values of the run's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hashed_seed(config.train.seed, name))
            return make().to(device)

    networks: dict[str, nn.Module] = {}
    if generating and config.objective.draws_per_sample:
        networks["dit"] = load(source.load_dit, "dit", low)
    if (generating and config.trains_language_side) or writing or ("segment" in tasks and "backbone" in config.trained_parts):
        backbone = networks["backbone"] = load(source.load_backbone, "backbone", frozen_dtype(precision))
        backbone.latent_queries.requires_grad_("latent_queries" in config.trained_parts)
        if backbone.latent_queries.requires_grad:
            backbone.latent_queries.data = backbone.latent_queries.data.float()
        if "latent_queries" in config.train.fresh:
            start_queries_afresh(backbone.latent_queries, config.train.seed)
    if writing:
        head = source.load_output_head(networks["backbone"], dtype=torch.float32 if "backbone" in full else frozen_dtype(precision),
                                       device=device, on_load=on_load)  # fmt: skip
        if "backbone" in config.train.fresh:
            start_afresh(head, "output_head", config.train.seed)
        networks["output_head"] = head if isinstance(head, TiedHead) else head.requires_grad_("backbone" in full)
    if "vision" in full:
        networks["vision_tower"] = load(source.load_vision_tower, "vision", low)
    if "clip" in full:
        networks["vision_encoder"] = load(sources.require_vision_encoder().load, "clip", low)
    if "contrast" in tasks:
        block_side = sources.require_vision_encoder().config.image_size // EMBEDDING_GRID if config.objective.pixel_weight else 0
        networks["text_tower"] = seeded("text tower", lambda: TextTower(source.tokenizer.vocabulary_size, channels, block_side))
    if "segment" in tasks:
        width = channels if "clip" in full else source.text_config.hidden_size
        networks["segmentation_head"] = seeded("segmentation head", lambda: segmentation_head(width))
    if generating:
        for name in ("regression_weight", "label_weight", "local_attention_weight"):
            if getattr(config.objective, name) and source.num_queries != EMBEDDING_GRID**2:
                raise ConfigError(f"objective.{name} ties query i to token i of an embedding of {EMBEDDING_GRID**2}, but "
                                  f"{source.folder} has {source.num_queries} queries. Set it to 0.")
    if generating and config.objective.regression_weight:
        networks["embedding_head"] = seeded("embedding head", lambda: nn.Linear(source.text_config.hidden_size, channels))
    if generating and config.objective.label_weight:
        networks["query_label_head"] = seeded("query label head", lambda: query_label_head(source.text_config.hidden_size))
    if "decode" in tasks:
        networks["unet"] = _load_decoder_part(sources, "unet", "decoder", config, dtype=low, device=device, on_load=on_load)
    if "autoencode" in tasks:
        networks["vae"] = _load_decoder_part(sources, "vae", "vae", config, dtype=torch.float32, device=device, on_load=on_load)
        if "vae_decoder" in full:
            for half in (networks["vae"].decoder, networks["vae"].post_quant_conv):
                half.requires_grad_(True)
        if config.objective.thumbnail_weight:
            networks["thumbnail_head"] = seeded("thumbnail head", lambda: thumbnail_head(networks["vae"].config.latent_channels))

    model = TrainingModel(frozen, build_objectives(config.objective, tasks), image_pad_id=source.tokenizer.image_pad_id,
                          checkpoint_layers=config.train.gradient_checkpointing, **networks)  # fmt: skip
    active: list[nn.Module] = []
    if "dit" in lora and model.dit is not None:
        add_adapters(model.dit, config.lora.dit_targets, config.lora, config.train.seed, "diffusion transformer")
        active += dropout_layers(model.dit)
    if "language_model" in lora:
        add_adapters(model.backbone.language_model, config.lora.language_model_targets, config.lora, config.train.seed, "language model")
        active += dropout_layers(model.backbone.language_model)
    if config.train.gradient_checkpointing:
        active += _checkpoint_layers(model)
    model.active = tuple(active)
    if device.type == "cpu":
        language_model = None if model.backbone is None else model.backbone.language_model
        vision = None if model.vision_tower is None else model.vision_tower.network
        for network in (language_model, vision, model.unet):
            if network is not None:
                write_out_attention(network)
    if config.train.compile:
        for network in (model.dit, model.backbone and model.backbone.language_model):  # a compiled UNet was slower on the CPU
            if network is not None:
                network.compile(dynamic=True)  # in place: names and weights stay; sizes differ from batch to batch
    if not model.trained():
        raise ConfigError("nothing would train. Check train.method, train.parts and lora.parts.")
    return model


def _load_decoder_part(
    sources: Sources, folder: str, part: str, config: TrainConfig, *, dtype: torch.dtype, device: torch.device, on_load: OnLoad | None
):  # fmt: skip
    decoder = sources.require_decoder()
    trained = part in config.train.parts
    network, entries = (decoder.empty_unet(), decoder.unet) if folder == "unet" else (decoder.empty_vae(), decoder.vae)
    network = fill(network, entries, component=f"decoder's {folder}", source=decoder.folder / folder,
                   dtype=torch.float32 if trained else dtype, device=device, on_load=on_load)  # fmt: skip
    if part in config.train.fresh:
        start_afresh(network, part, config.train.seed)
    return network.requires_grad_(trained)


def _checkpoint_layers(model: TrainingModel) -> list[nn.Module]:
    """Turns on recomputation in the networks of other libraries -> those that do it only in training mode (none has dropout)."""
    active: list[nn.Module] = []
    if model.backbone is not None and any(parameter.requires_grad for parameter in model.backbone.parameters()):
        _recompute(model.backbone.language_model)
        active.append(model.backbone.language_model)
    if model.vision_tower is not None:
        _recompute(model.vision_tower.network)
        active.append(model.vision_tower.network)
    if model.vision_encoder is not None:
        for block in model.vision_encoder.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    for network in (model.unet, model.vae):
        if network is not None:
            network.enable_gradient_checkpointing()
            active.append(network)
    return active


def _recompute(network: nn.Module) -> None:
    """Of transformers, which renames the method in 5.x."""
    if hasattr(network, "activation_checkpointing_enable"):
        network.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def parameters_by_part(model: TrainingModel) -> Mapping[str, tuple[int, int]]:
    """Network -> (trained, all) numbers of parameters, of what is loaded for training."""
    table = {}
    for name, network in model.named_children():
        parameters = list(network.parameters())
        table[name] = (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
    return table
