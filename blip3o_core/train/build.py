"""Configuration -> the networks of a run: which are loaded, in which precision, which of their weights train."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..checkpoint.load import OnLoad, fill
from ..data.sample import GENERATION_TASKS, WRITING_TASKS
from ..errors import ConfigError
from ..models.qwen2_5_vl import TiedHead
from .adapters import add_adapters, dropout_layers
from .config import TrainConfig
from .contrastive import TextTower
from .frozen import FrozenNetworks, Sources
from .model import TrainingModel
from .noise import hashed_seed
from .objectives import TRAINS, build_objectives

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(precision: str, device: torch.device) -> str:
    """auto is bf16 on an accelerator and fp32 on the CPU."""
    if precision != "auto":
        return precision
    return "fp32" if device.type == "cpu" else "bf16"


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
    unified = [task for task in tasks if task in GENERATION_TASKS]
    if "clip" in parts and unified:
        raise ConfigError(f"clip can't train in one run with {unified[0]}: its features are what that task learns. Train it first.")


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
    checkpoint = sources.checkpoint

    def load(loader, part: str, frozen_as: torch.dtype) -> nn.Module:
        network = loader(dtype=torch.float32 if part in full else frozen_as, device=device, on_load=on_load)
        return network.requires_grad_(True) if part in full else network

    networks: dict[str, nn.Module] = {}
    if generating:
        networks["dit"] = load(checkpoint.load_dit, "dit", low)
    if (generating and config.trains_language_side) or writing:
        backbone = networks["backbone"] = load(checkpoint.load_backbone, "backbone", frozen_dtype(precision))
        backbone.latent_queries.requires_grad_("latent_queries" in config.trained_parts)
        backbone.latent_queries.data = backbone.latent_queries.data.float()
        if "backbone" in full and not generating:
            backbone.latent_queries.requires_grad_(False)  # no text reaches them
        if not writing:
            backbone.language_model.requires_grad_("backbone" in full)
    if writing:
        head = checkpoint.load_output_head(networks["backbone"], dtype=torch.float32 if "backbone" in full else frozen_dtype(precision),
                                           device=device, on_load=on_load)  # fmt: skip
        networks["output_head"] = head if isinstance(head, TiedHead) else head.requires_grad_("backbone" in full)
    if "vision" in full:
        networks["vision_tower"] = load(checkpoint.load_vision_tower, "vision", low)
    if "contrast" in tasks:
        networks["vision_encoder"] = load(sources.require_vision_encoder().load, "clip", low)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(hashed_seed(config.train.seed, "text tower"))
            networks["text_tower"] = TextTower(checkpoint.tokenizer.vocabulary_size, checkpoint.dit_config.in_channels).to(device)
    if "decode" in tasks:
        networks["unet"] = _load_decoder_part(sources, "unet", trained="decoder" in full, dtype=low, device=device, on_load=on_load)
    if "autoencode" in tasks:
        networks["vae"] = _load_decoder_part(sources, "vae", trained="vae" in full, dtype=torch.float32, device=device, on_load=on_load)

    model = TrainingModel(frozen, build_objectives(config.objective, tasks), image_pad_id=checkpoint.tokenizer.image_pad_id,
                          checkpoint_layers=config.train.gradient_checkpointing, **networks)  # fmt: skip
    active: list[nn.Module] = []
    if "dit" in lora and model.dit is not None:
        add_adapters(model.dit, config.lora.dit_targets, config.lora, config.train.seed, "diffusion transformer")
        active += dropout_layers(model.dit)
    if "language_model" in lora:
        add_adapters(model.backbone.language_model, config.lora.language_model_targets, config.lora, config.train.seed, "language model")
        active += dropout_layers(model.backbone.language_model)
        model.backbone.latent_queries.requires_grad_(config.lora.latent_queries)
    if config.train.gradient_checkpointing:
        active += _checkpoint_layers(model)
    model.active = tuple(active)
    if not model.trained():
        raise ConfigError("nothing would train. Check train.method, train.parts and lora.parts.")
    return model


def _load_decoder_part(sources: Sources, part: str, *, trained: bool, dtype: torch.dtype, device: torch.device, on_load: OnLoad | None):
    decoder = sources.require_decoder()
    network, entries = (decoder.empty_unet(), decoder.unet) if part == "unet" else (decoder.empty_vae(), decoder.vae)
    network = fill(network, entries, component=f"decoder's {part}", source=decoder.folder / part,
                   dtype=torch.float32 if trained else dtype, device=device, on_load=on_load)  # fmt: skip
    return network.requires_grad_(trained)


def _checkpoint_layers(model: TrainingModel) -> list[nn.Module]:
    """Turns on recomputation in the networks of other libraries -> those that do it only in training mode (none has dropout)."""
    active: list[nn.Module] = []
    if model.backbone is not None and any(parameter.requires_grad for parameter in model.backbone.parameters()):
        model.backbone.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        active.append(model.backbone.language_model)
    if model.vision_tower is not None:
        model.vision_tower.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        active.append(model.vision_tower.network)
    for network in (model.unet, model.vae):
        if network is not None:
            network.enable_gradient_checkpointing()
            active.append(network)
    return active


def parameters_by_part(model: TrainingModel) -> Mapping[str, tuple[int, int]]:
    """Network -> (trained, all) numbers of parameters, of what is loaded for training."""
    table = {}
    for name, network in model.named_children():
        parameters = list(network.parameters())
        table[name] = (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
    return table
