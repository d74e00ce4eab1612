"""Optimisers by name, and the learning rate as a pure function of the step."""

import math
from collections.abc import Mapping

import torch
from torch import nn

from ..errors import ConfigError
from ..runtime import require_package
from .config import OptimizerOptions
from .muon import Muon


def build_optimizer(
    options: OptimizerOptions, named_parameters: Mapping[str, nn.Parameter], device: torch.device
) -> torch.optim.Optimizer:
    """Raises InputError if the package of an optional one is missing, ConfigError if it can't run here."""
    parameters = list(named_parameters.values())
    settings = {"lr": options.learning_rate, "betas": (options.beta1, options.beta2), "eps": options.epsilon,
                "weight_decay": options.weight_decay}  # fmt: skip
    if options.name == "adamw8bit":
        if device.type != "cuda":
            raise ConfigError(f"optimizer.name is adamw8bit, which needs CUDA; this run is on {device}. Use adamw.")
        bitsandbytes = require_package("bitsandbytes", extra="adamw8bit", purpose="optimizer.name = adamw8bit")
        return bitsandbytes.optim.AdamW8bit(parameters, **settings)
    if options.name == "prodigy":
        prodigy = require_package("prodigyopt", extra="prodigy", purpose="optimizer.name = prodigy").Prodigy
        return prodigy(parameters, **settings, decouple=True, safeguard_warmup=options.warmup_steps > 0, use_bias_correction=True)
    if options.name == "muon":
        return Muon(named_parameters, **settings)
    return torch.optim.AdamW(parameters, **settings)


def learning_rate(options: OptimizerOptions, step: int, steps: int) -> float:
    """Of the update with this number (from 0): linear warm-up to the peak, then constant or cosine down to its minimum."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    if options.schedule == "constant":
        return options.learning_rate
    progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return options.learning_rate * (options.minimum_ratio + (1 - options.minimum_ratio) * cosine)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = value
