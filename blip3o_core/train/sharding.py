"""FSDP (version 2, torch's fully_shard): every process keeps a slice of each weight, of its gradient and of its optimiser state.

Files never do: what is saved is gathered on the main process first, so that a checkpoint fits any number of processes. Gathering and
forward passes are collective; every process makes the same ones in the same order.
"""

import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..data.sample import GENERATION_TASKS, WRITING_TASKS
from ..errors import ConfigError
from .config import TrainConfig
from .model import TrainingModel

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

BLOCKS = ("NextDiTBlock", "Qwen2_5_VLDecoderLayer", "Qwen2_5_VLVisionBlock", "BasicTransformerBlock", "ResnetBlock2D")
"""Classes whose weights are gathered block by block; all others are gathered once for a whole forward and backward pass."""

ENTRIES = ("encode_context",)  # methods of blocks that are called besides forward


def is_sharded(accelerator: "Accelerator") -> bool:
    """Whether weights are split over the processes."""
    return accelerator.distributed_type == "FSDP"


def require_shardable(accelerator: "Accelerator", config: TrainConfig) -> None:
    """Raises ConfigError for what a sharded run can't do; without sharding only for DeepSpeed."""
    if accelerator.distributed_type == "DEEPSPEED":
        raise ConfigError("DeepSpeed keeps its own copies of weights and optimizer state, which checkpoints and exports here would miss "
                          "at every ZeRO stage. FSDP 2 splits the same things: accelerate launch --use_fsdp --fsdp_version 2.")
    if not is_sharded(accelerator):
        return
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ConfigError("FSDP version 1 is not supported: its flattened weights don't fit our checkpoints. Take version 2: accelerate "
                          "launch --use_fsdp --fsdp_version 2, or fsdp_version: 2 in its configuration file.")
    if plugin.activation_checkpointing:
        raise ConfigError("FSDP's activation checkpointing would rename the weights. Set fsdp_activation_checkpointing: false and take "
                          "train.gradient_checkpointing = true.")
    if type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy":
        raise ConfigError("fsdp_offload_params is on, which checkpoints here can't gather. Turn it off.")
    if accelerator.mixed_precision == "fp16":
        raise ConfigError('train.precision is "fp16", which doesn\'t work with sharded weights. Use "bf16".')
    if config.train.compile:
        raise ConfigError("train.compile is not supported with sharded weights. Turn it off, or launch without FSDP.")
    if config.optimizer.name != "adamw":
        raise ConfigError(f"optimizer.name is {config.optimizer.name}, which doesn't work with sharded weights. Use adamw.")
    if config.train.method == "lora" and config.lora.dora:
        raise ConfigError("lora.dora doesn't work with sharded weights: it needs the norms of whole rows. Turn it off, or launch without "
                          "FSDP.")
    if config.samples.every:
        raise ConfigError("samples.every is set, but one process can't draw with weights that are sharded. Set it to 0 and draw from the "
                          "result, or launch without FSDP.")
    _require_one_path(config)


def _require_one_path(config: TrainConfig) -> None:
    """All batches must pass the same blocks: a process that meets a task alone would wait for the others for ever."""
    tasks = {data.task for data in [*config.data, *config.validation.data]}
    for task in ("contrast", "autoencode", "segment"):
        if task in tasks:
            raise ConfigError(f"data with task = {task!r} can't be trained with sharded weights. Launch without FSDP: these networks are "
                              "small enough.")
    if "vision" in config.trained_parts and not tasks <= {"edit", "reconstruct"}:
        raise ConfigError(f"the vision tower can be trained with sharded weights only on samples that all have pictures (tasks edit and "
                          f"reconstruct), not on {', '.join(sorted(tasks))}. Leave it frozen, or launch without FSDP.")
    if not any(tasks <= set(together) for together in (GENERATION_TASKS, WRITING_TASKS, ("decode",))):
        raise ConfigError(f"with sharded weights all data has to pass the same networks, which {', '.join(sorted(tasks))} don't. Train "
                          "them in runs of their own, or launch without FSDP.")


def prepare_sharded(accelerator: "Accelerator", model: TrainingModel, optimizer: torch.optim.Optimizer):
    """As accelerator.prepare, in place: the model's parameters are others afterwards. -> model, optimizer."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, register_fsdp_forward_method
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    present = {type(module).__name__ for module in model.modules()}
    plugin.auto_wrap_policy = transformer_auto_wrap_policy  # ours in any case: parts are also called beside their forward
    plugin.transformer_cls_names_to_wrap = [name for name in BLOCKS if name in present]
    plugin.cpu_ram_efficient_loading = False  # every process has read the weights
    compute = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
    # Keys and values of the context are transposed views, which nothing here changes in place: torch's warning on every pass is moot.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    for module in wrapped.modules():
        for name in ENTRIES:
            if isinstance(module, FSDPModule) and hasattr(module, name):
                register_fsdp_forward_method(module, name)
    if accelerator.is_main_process:
        log.info("weights are sharded over %d processes, by %s", accelerator.num_processes, ", ".join(plugin.transformer_cls_names_to_wrap))
    return wrapped, optimizer


def gathered(tensors: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
    """Whole tensors, those that were sharded on the CPU. Collective; -> nothing where `keep` is false."""
    found = {}
    for name, tensor in tensors.items():
        full = _whole(tensor.detach())
        if keep:
            found[name] = full
    return found


def gathered_optimizer(optimizer: torch.optim.Optimizer, *, keep: bool) -> dict[str, Any]:
    """What optimizer.state_dict() would be without sharding. Collective; -> nothing where `keep` is false."""
    state = optimizer.state_dict()
    whole = {}
    for number, values in state["state"].items():
        full = {name: _whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        if keep:
            whole[number] = full
    return {**state, "state": whole} if keep else {}


@torch.no_grad()
def assign(target: Tensor, full: Tensor) -> None:
    """Writes a whole tensor into a sharded or a whole one. Collective if it is sharded."""
    if _is_slice(target):
        target.to_local().copy_(_slice(full, target).to_local())
    else:
        target.data.copy_(full)


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """From a whole state. Collective if parameters are sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {number: {name: _slice(value, parameters[number]) if _is_slice(parameters[number]) and _has_shape_of(parameters[number], value)
                    else value for name, value in values.items()}
           for number, values in state["state"].items()}  # fmt: skip
    optimizer.load_state_dict({**state, "state": own})


def replace_weights(wrapped: nn.Module, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Writes slices into slices, and forgets what was gathered from the old ones."""
    from torch.distributed.fsdp import FSDPModule

    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.to_local().copy_(values[name].to_local())
    for module in wrapped.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_number(value: Tensor) -> float:
    """A norm as a number. Collective if it is sharded."""
    return float(_whole(value))


def _is_slice(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _has_shape_of(parameter: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor().cpu() if _is_slice(tensor) else tensor


def _slice(full: Tensor, like: Tensor) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full.to(like.to_local().device), like.device_mesh, like.placements)
