"""The loop: micro-batches -> updates. Knows no model, no loss and no file format."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data.loading import Item
from ..errors import TrainingError
from .config import TrainConfig
from .ema import MovingAverage
from .noise import Draw, hashed_seed
from .optimizer import learning_rate, set_learning_rate
from .sharding import whole_number
from .state import RunState

if TYPE_CHECKING:
    from accelerate import Accelerator

STOPPING = (signal.SIGINT, signal.SIGTERM)
SAME_SIGNAL_S = 2  # one Ctrl-C comes twice: from the terminal, and from `accelerate launch`


@dataclass
class Run:
    """One process's view of a run. `state` is everything that moves and is saved; `wrapped` is what DDP made of the model."""

    config: TrainConfig
    accelerator: "Accelerator"
    wrapped: nn.Module
    parameters: Mapping[str, nn.Parameter]  # that train, by name
    optimizer: torch.optim.Optimizer
    ema: MovingAverage | None
    state: RunState
    tasks: Sequence[str]
    has_dropout: bool = False
    broken_here: dict[str, str] = field(default_factory=dict)  # found by this process since the last save


@dataclass(frozen=True)
class Update:
    """What one update was like, over all processes."""

    loss: float  # weighted mean over all samples
    losses: dict[str, float]  # unweighted mean per task that occurred
    learning_rate: float
    grad_norm: float
    samples: int
    broken: int  # found since the last save; one that several processes met counts several times


class StopRequest:
    """Ctrl-C and SIGTERM, taken note of: the update in progress is finished, then the run saves. A second Ctrl-C is immediate."""

    def __init__(self) -> None:
        self.signal = 0
        self._noted = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        with contextlib.suppress(ValueError):  # not in the main thread: whoever runs us there stops us otherwise
            for number in STOPPING:
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self.signal and number == signal.SIGINT and now - self._noted > SAME_SIGNAL_S:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._noted = number, now


def train(run: Run, batches: Iterator[Sequence[Item]], stop: StopRequest, after_update: Callable[[Update], None]) -> int:
    """Updates until config.train.steps are done -> 0, or until a signal -> its number.

    Args:
        batches: this process's micro-batches from run.state.position on.
        after_update: called on every process after every update, with run.state already counted up.
    Raises: TrainingError if a loss or gradient is not finite; nothing is then updated.
    """
    config, accelerator, state = run.config, run.accelerator, run.state
    world, options = accelerator.num_processes, config.train
    began, before = time.monotonic(), state.seconds
    while state.step < options.steps:
        rate = learning_rate(config.optimizer, state.step, options.steps)
        set_learning_rate(run.optimizer, rate)
        sums = {task: [0.0, 0] for task in run.tasks}
        weighted, norm = 0.0, math.nan
        for micro in range(options.gradient_accumulation):
            items = next(batches)
            for item in items:
                run.broken_here.update(item.broken)
            with accelerator.accumulate(run.wrapped):
                losses = _forward(run, items, micro)
                weights = torch.tensor([config.objective.weights.get(item.example.task, 1.0) for item in items], device=losses.device)
                loss = (losses * weights).mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = _clip(run, loss)
                run.optimizer.step()
                run.optimizer.zero_grad()
            weighted += loss.item() / options.gradient_accumulation
            for item, value in zip(items, losses.tolist(), strict=True):
                sums[item.example.task][0] += value
                sums[item.example.task][1] += 1
        state.step += 1
        state.position += options.batch_size * world * options.gradient_accumulation
        state.seconds = before + time.monotonic() - began
        if run.ema is not None:
            run.ema.update(run.parameters, state.step)
        update, stopped = _agree(run, weighted, sums, rate, norm, stop)
        after_update(update)
        if stopped:
            return stopped
    return 0


def _forward(run: Run, items: Sequence[Item], micro: int) -> torch.Tensor:
    """Losses (B,); the random numbers of each sample follow from its position."""
    seed, accelerator = run.config.train.seed, run.accelerator
    draws = [Draw((seed, "train", item.position)) for item in items]
    examples = [item.example for item in items]
    if not run.has_dropout:
        with accelerator.autocast():  # DDP has it built in, sharded models don't
            return run.wrapped(examples, draws)
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    with accelerator.autocast(), torch.random.fork_rng(devices=devices):  # adapters' dropout takes numbers from torch's global one
        torch.manual_seed(hashed_seed(seed, "dropout", run.state.step, micro, accelerator.process_index))
        return run.wrapped(examples, draws)


def _clip(run: Run, loss: torch.Tensor) -> float:
    """The norm of the gradients before clipping. Raises TrainingError if it, or the loss, is not finite."""
    accelerator, limit = run.accelerator, run.config.train.max_grad_norm
    norm = whole_number(accelerator.clip_grad_norm_(list(run.parameters.values()), limit if limit > 0 else math.inf))
    if accelerator.mixed_precision != "fp16" and not (math.isfinite(loss.item()) and math.isfinite(norm)):
        raise TrainingError(f"step {run.state.step + 1}: the loss is {loss.item():.4g} and the norm of the gradients {norm:.4g}; nothing "
                            f"was updated. Resume with optimizer.learning_rate below {run.config.optimizer.learning_rate:g}, or with "
                            "train.precision = \"fp32\", from a checkpoint before this step.")  # fmt: skip
    return norm


def _agree(run: Run, weighted: float, sums: dict[str, list], rate: float, norm: float, stop: StopRequest) -> tuple[Update, int]:
    """What all processes saw in this update, and the signal to stop at if any of them got one: one small message."""
    new = sum(name not in run.state.broken for name in run.broken_here)
    values = [float(stop.signal), weighted, float(new), *(number for task in run.tasks for number in sums[task])]
    world = run.accelerator.num_processes
    if world > 1:
        together = run.accelerator.gather(torch.tensor([values], dtype=torch.float64, device=run.accelerator.device)
                                          if run.accelerator.device.type != "mps" else torch.tensor([values])).cpu()  # fmt: skip
        values = [together[:, 0].max().item(), together[:, 1].mean().item(), *together[:, 2:].sum(dim=0).tolist()]
    totals = zip(run.tasks, values[3::2], values[4::2], strict=True)
    losses = {task: total / count for task, total, count in totals if count}
    options = run.config.train
    update = Update(values[1], losses, rate, norm, options.batch_size * world * options.gradient_accumulation, int(values[2]))
    return update, int(values[0])
