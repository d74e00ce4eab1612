"""Run first by the processes of test_sharded.py: lets accelerate turn FSDP on without an accelerator, with gloo between CPUs."""

import accelerate
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

Accelerator = accelerate.Accelerator


def on_the_cpu(self: PartialState) -> None:
    self.device = torch.device("cpu")


PartialState._prepare_backend = lambda self, *args, **options: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = on_the_cpu
accelerate.Accelerator = lambda **options: Accelerator(**{**options, "cpu": False})
