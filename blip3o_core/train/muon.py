"""Muon: momentum of matrices and convolutions is made orthogonal before it is added to the weights; AdamW for all other weights.

Every direction of a weight then learns at the same pace, also those that few samples ask for. Source: K. Jordan et al., "Muon: An
optimizer for hidden layers in neural networks" (2024); the scale, with which it takes AdamW's learning rates: arXiv:2502.16982, sec. 2.2.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

_OUTER = ("embed_tokens.", "latent_queries", "_head.", "conv_in.", "conv_out.")  # first and last: rows are words, queries or answers
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # steep at 0, and near 1 between 0.7 and 1.2 after five rounds
_ROUNDS = 5
_MOMENTUM = 0.95
_RMS = 0.2  # of an entry of AdamW's usual updates


class Muon(torch.optim.Optimizer):
    """named_parameters: hidden matrices and convolutions get orthogonal updates; vectors, embeddings and heads those of AdamW.

    betas, eps: of AdamW's; the momentum of the others is 0.95.
    """

    def __init__(self, named_parameters: Mapping[str, nn.Parameter], *, lr: float, betas: tuple[float, float], eps: float,
                 weight_decay: float) -> None:  # fmt: skip
        hidden = {name: is_hidden_matrix(name, parameter) for name, parameter in named_parameters.items()}
        groups = [{"params": [named_parameters[name] for name in hidden if hidden[name] == orthogonal], "orthogonal": orthogonal}
                  for orthogonal in (True, False)]  # fmt: skip
        super().__init__([group for group in groups if group["params"]],
                         {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})  # fmt: skip

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            (self._orthogonal_step if group["orthogonal"] else self._adam_step)(parameters, group)
        return loss

    def _orthogonal_step(self, parameters: list[Tensor], group: dict) -> None:
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            by_shape[parameter.shape].append(parameter)
        for shape, same in by_shape.items():  # together: many small products are slow one by one
            moving = []
            for parameter in same:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(parameter.grad, 1 - _MOMENTUM)
                moving.append(parameter.grad.lerp(state["momentum"], _MOMENTUM))  # Nesterov's
            scale = _RMS * max(shape[0], shape[1:].numel()) ** 0.5
            updates = orthogonalised(torch.stack(moving).flatten(2))
            for parameter, update in zip(same, updates, strict=True):
                parameter.add_(update.to(parameter.dtype).view_as(parameter), alpha=-group["lr"] * scale)

    def _adam_step(self, parameters: list[Tensor], group: dict) -> None:
        first, second = group["betas"]
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state.update(step=0, mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
            state["step"] += 1
            state["mean"].lerp_(parameter.grad, 1 - first)
            state["square"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
            deviation = (state["square"] / (1 - second ** state["step"])).sqrt_().add_(group["eps"])
            parameter.addcdiv_(state["mean"], deviation, value=-group["lr"] / (1 - first ** state["step"]))


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Between two layers of a network; a convolution (out, in, height, width) counts as a matrix of `out` rows."""
    return parameter.ndim in (2, 4) and min(parameter.shape[:2]) > 1 and not any(part in name for part in _OUTER)


def orthogonalised(matrices: Tensor) -> Tensor:
    """matrices (n, rows, columns) -> the same with singular values of about 1 (0.7 to 1.2), bfloat16: Newton-Schulz iteration."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
