"""The solvers of the embedding, each with the settings that it is meant to be used with."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import InputError
from .dpm_solver import sample_dpm_solver
from .flow_matching import OnStep, Velocity, sample_ab2, sample_euler, sample_heun


@dataclass(frozen=True)
class Solver:
    """How to integrate, and with which settings it is meant to be used.

    whole_timesteps: the network is told integers, as by the reference. An order above 1 is lost on a velocity that is rounded in time,
    if there are many steps.
    """

    sample: Callable[[Velocity, Tensor, Tensor, OnStep | None], Tensor]
    steps: int
    schedule: str
    whole_timesteps: bool = False


DEFAULT_SOLVER = "dpmpp_2m"
SOLVERS = {
    "dpmpp_2m": Solver(sample_dpm_solver, steps=12, schedule="cosine", whole_timesteps=True),
    "euler": Solver(sample_euler, steps=30, schedule="linear", whole_timesteps=True),
    "heun": Solver(sample_heun, steps=15, schedule="cosine"),
    "ab2": Solver(sample_ab2, steps=20, schedule="linear"),
}
"""euler with 30 linear steps is the reference; docs/sampling.md compares them with a solution of 500 calls."""


def require_solver(name: str) -> None:
    """Raises InputError for a name that is not in SOLVERS."""
    if name not in SOLVERS:
        raise InputError(f"solver {name!r} is unknown. Use one of {', '.join(SOLVERS)}.")
