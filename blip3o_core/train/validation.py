"""The loss on fixed samples, with fixed noise at fixed noise levels: comparable from step to step and from run to run."""

from collections.abc import Sequence

import torch

from ..data.prepare import Example
from ..data.sample import GENERATION_TASKS
from .model import TrainingModel
from .noise import Draw

NOISY_TASKS = (*GENERATION_TASKS, "decode")


@torch.no_grad()
def validation_losses(
    model: TrainingModel, examples: Sequence[Example], *, timesteps: int, batch_size: int, seed: int, rank: int = 0, world: int = 1,
) -> dict[str, tuple[float, int]]:  # fmt: skip
    """Task -> (sum of losses, number of them) over this rank's share of the examples.

    Args:
        timesteps: noise levels per example, at u = 0.5 / n, 1.5 / n, ...; tasks without noise are measured once.
    """
    pairs = []
    for number, example in enumerate(examples):
        levels = timesteps if example.task in NOISY_TASKS else 1
        for level in range(levels):
            draw = Draw((seed, "validation", number, level), u=(level + 0.5) / levels, training=False)
            pairs.append((example, draw))
    model.set_training(False)
    sums: dict[str, tuple[float, int]] = {}
    for task in dict.fromkeys(example.task for example in examples):  # one task at a time: contrastive losses see only their own
        of_task = [pair for pair in pairs if pair[0].task == task]
        own = of_task[rank::world]
        for start in range(0, len(of_task[::world]), batch_size):  # as often as the first rank: with sharded weights passes are collective
            batch = own[start : start + batch_size]
            losses = model([example for example, _ in batch or of_task[:1]], [draw for _, draw in batch or of_task[:1]])[: len(batch)]
            total, count = sums.get(task, (0.0, 0))
            sums[task] = (total + losses.double().sum().item(), count + len(batch))
    model.set_training(True)
    return sums
