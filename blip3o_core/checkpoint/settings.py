"""What a configuration may say: wrong values are refused before a network is built of them, and not met when it runs."""

import contextlib
import inspect
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from ..errors import CheckpointError

AGAIN = "Take the file from the repository of the weights again."


@contextlib.contextmanager
def sensible(component: str, source: object) -> Iterator[None]:
    """Around the building of a network: whatever its library raises about the configuration becomes a CheckpointError."""
    try:
        yield
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # transformers and diffusers raise what a wrong value happens to lead to
        raise CheckpointError(f"{source}: the configuration of the {component} makes no sense ({error!r:.300}). {AGAIN}") from error


def require_countable(config: Mapping[str, Any], tensors: int, source: object) -> None:
    """Raises CheckpointError if `config` has more layers, or longer lists, than there are tensors: building those may never end."""

    def largest(value: Any) -> int:
        if isinstance(value, list | tuple):
            return max([len(value), *map(largest, value)])
        return value if isinstance(value, int) else 0

    for name, value in config.items():
        counts = "layers" in name or name == "depth"
        if largest(value if counts else [None] * len(value) if isinstance(value, list) else None) > tensors:
            raise CheckpointError(f"{source}: {name} is {value!r:.60}, but there are only {tensors} tensors. {AGAIN}")


def require_plain(config: Mapping[str, Any], network: type, sizes: Collection[str], source: object) -> None:
    """Raises CheckpointError if `config` changes more of a diffusers network than what is listed in `sizes`."""
    for name, parameter in inspect.signature(network.__init__).parameters.items():
        value, usual = config.get(name, parameter.default), parameter.default
        if name not in sizes and (value != usual or isinstance(value, bool) != isinstance(usual, bool)):  # True is 1, but no padding
            raise CheckpointError(f"{source}: {name} is {value!r:.60}, but {usual!r} in all such decoders. {AGAIN}")


def number(config: Mapping[str, Any], name: str, source: object, *, low: float, high: float, default: float | None = None) -> float:
    """A finite number of `config`, low <= number <= high. Raises CheckpointError; `default` is for what isn't there."""
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or not math.isfinite(value):
        raise CheckpointError(f"{source}: {name} is {value!r:.60}, not a number from {low:g} to {high:g}. {AGAIN}")
    return value


def whole(config: Mapping[str, Any], name: str, source: object, *, low: int = 1, high: int = 2**31, default: int | None = None) -> int:
    """As `number`, for whole ones."""
    value = config.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise CheckpointError(f"{source}: {name} is {value!r:.60}, not a whole number from {low} to {high}. {AGAIN}")
    return value
