"""LoRA adapters on the DiT and the language model through peft, and back out as what a LoRA file holds."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..lora.files import Adapter
from ..runtime import require_package
from .config import LoraOptions
from .noise import hashed_seed

ADAPTER = "default"  # peft's name for the only adapter


def add_adapters(network: nn.Module, targets: Sequence[str], options: LoraOptions, seed: int, what: str) -> None:
    """Puts float32 adapters beside the layers whose names end in one of `targets`, in place; nothing else trains.

    The start values depend on `seed` alone. Raises ConfigError for a target that no layer has.
    """
    peft = require_package("peft", extra="train", purpose="LoRA training")
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({".".join(part for part in name.split(".")[-2:] if not part.isdigit()) for name in names})
            raise ConfigError(f"lora: no layer of the {what} is called {target!r}. Its layers end in: {', '.join(ends)}.")
    settings = peft.LoraConfig(r=options.rank, lora_alpha=options.alpha, lora_dropout=options.dropout, use_rslora=options.rslora,
                               use_dora=options.dora, target_modules=list(targets))  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hashed_seed(seed, "adapters", what))
        peft.inject_adapter_in_model(settings, network)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft takes the precision of the frozen layer


def read_adapters(network: nn.Module, values: Mapping[str, Tensor] | None = None) -> dict[str, Adapter]:
    """Layer name -> its adapter, on the CPU.

    Args:
        values: parameter name in `network` -> tensor, in place of the current ones (a moving average).
    """
    from peft.tuners.lora import LoraLayer

    values = dict(network.named_parameters()) if values is None else values
    adapters = {}
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            magnitude = values.get(f"{name}.lora_magnitude_vector.{ADAPTER}.weight")
            down, up = (values[f"{name}.lora_{part}.{ADAPTER}.weight"] for part in "AB")
            adapters[name] = Adapter(
                down=_stored(down), up=_stored(up), alpha=float(module.scaling[ADAPTER] * module.r[ADAPTER]),
                magnitude=None if magnitude is None else _stored(magnitude),
            )  # fmt: skip
    return adapters


def dropout_layers(network: nn.Module) -> tuple[nn.Module, ...]:
    """The adapters' dropout, which is off outside of training."""
    return tuple(module for module in network.modules() if isinstance(module, nn.Dropout))


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().clone()
