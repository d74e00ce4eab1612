"""A moving average of the trained weights."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .sharding import assign

WARMUP = 10  # the average follows closely at first: decay is at most (1 + step) / (10 + step)


class MovingAverage:
    """shadow = decay * shadow + (1 - decay) * weight after every update, in float32."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.shadow = {name: parameter.detach().float().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """`step`: updates done, from 1."""
        decay = min(self.decay, (1 + step) / (WARMUP + step))
        for name, parameter in parameters.items():
            self.shadow[name].lerp_(parameter.detach().float(), 1 - decay)

    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """From a checkpoint."""
        for name, tensor in shadow.items():
            assign(self.shadow[name], tensor)
