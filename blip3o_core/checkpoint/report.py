"""One error that says everything that is wrong between a file and the network it should fill."""

from collections.abc import Iterable, Mapping

from ..errors import CheckpointError
from .shards import TensorEntry

LISTED = 8  # names printed per kind of problem


def require_matching(
    component: str, source: object, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorEntry]
) -> None:
    """Raises CheckpointError that lists missing, unexpected and misshapen tensors; names are those of the network."""
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys())
    misshapen = [f"{found[key].name} is {list(found[key].shape)}, expected {list(expected[key])}"
                 for key in sorted(expected.keys() & found.keys()) if tuple(expected[key]) != found[key].shape]
    problems = [f"{len(names)} {kind}: {_listed(names)}"
                for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if names]
    if problems:
        raise CheckpointError(f"{source}: the tensors of the {component} don't fit its configuration; {'; '.join(problems)}. "
                              "Weights and config.json come from different models: download both from one repository.")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
