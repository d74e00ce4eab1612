"""API-format graphs for the tests: the shipped one on the tiny checkpoint, and its native variations."""

import copy
import json
from typing import Any

from .hosts import REPOSITORY

TINY = "tiny"
SIDE = 64
LOADER, PROMPT, EMBEDDING, DECODER, CONDITIONING, SIZE, PICTURE = "1", "2", "6", "10", "11", "12", "14"
SCHEDULE, PICTURE_SCHEDULE = "4", "13"

Graph = dict[str, dict[str, Any]]


def shipped(name: str = "text_to_image") -> Graph:
    """A graph of workflows/api as it is shipped."""
    return json.loads((REPOSITORY / "workflows" / "api" / f"{name}.json").read_text("utf-8"))


def text_to_image(prompt: str | None = None, seed: int | None = None, checkpoint: str = TINY, side: int = SIDE) -> Graph:
    """The shipped graph with the tiny checkpoint and small pictures; nothing else is changed."""
    graph = shipped()
    for node in graph.values():
        inputs = node["inputs"]
        inputs.update({name: checkpoint for name in ("checkpoint", "decoder") if name in inputs})
    for node in (CONDITIONING, SIZE):
        graph[node]["inputs"].update(width=side, height=side)
    if prompt is not None:
        graph[PROMPT]["inputs"]["prompt"] = prompt
    if seed is not None:
        graph[EMBEDDING]["inputs"]["noise_seed"] = graph[PICTURE]["inputs"]["noise_seed"] = seed
    return graph


def embedding_only(steps: int = 4, **changes: Any) -> Graph:
    """The first stage alone; the embedding is saved as output/embedding_*.latent. `changes` go to the sampler node."""
    graph = {key: copy.deepcopy(node) for key, node in text_to_image().items() if key in ("1", "2", "3", "4", "5", "6")}
    graph[SCHEDULE]["inputs"]["steps"] = steps
    graph[EMBEDDING]["inputs"].update(changes)
    graph["save"] = save_latent([EMBEDDING, 0])
    return graph


def save_latent(source: list, prefix: str = "embedding") -> dict[str, Any]:
    return {"class_type": "SaveLatent", "inputs": {"samples": source, "filename_prefix": prefix}}
