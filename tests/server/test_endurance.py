"""Many prompts of all kinds through one server, a fifth of them interrupted, models freed in between: nothing grows and nothing is lost.

The short run belongs to every test run; `pytest -m nightly -s tests/server/test_endurance.py` queues 300 and prints what
docs/reliability.md tells.
"""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from . import graphs
from .comfy_server import ComfyServer, Event
from .graphs import Graph

WARM_UP = 20
"""Prompts after which everything has been loaded once."""
GROWTH = 0.05
INTERRUPTED = 0.2
FREED_EVERY = 25
EDITING, VARIATIONS, CHAT = "image_editing", "variations_and_mixing", "multi_turn_chat"


def random_graph(rng: random.Random) -> Graph:
    """Drawing, editing, variation, asking or a conversation, with its own seed."""
    kind = rng.choice(("draw", "draw", "edit", "vary", "ask", "chat"))
    seed = rng.randrange(2**32)
    if kind == "draw":
        return graphs.replace_inputs(graphs.text_to_image(prompt=f"a cat number {seed}", seed=seed), steps=rng.randint(2, 6))
    if kind == "ask":
        return graphs.ask(f"How many cats are there, {seed}?")
    graph = graphs.tiny({"edit": EDITING, "vary": VARIATIONS, "chat": CHAT}[kind])
    for node in graph.values():
        if "noise_seed" in node["inputs"]:
            node["inputs"]["noise_seed"] = seed
    return graph


def interrupt_after(server: ComfyServer, steps: int) -> Callable[[Event], None]:
    """Interrupts at the given step of progress; for `ComfyServer.run`."""
    counted = itertools.count(1)

    def on_event(event: Event) -> None:
        if event["type"] == "progress" and next(counted) == steps:
            server.interrupt()

    return on_event


def inputs(graph: Graph) -> dict[str, Any]:
    """Without what the host notes beside them."""
    return {key: (node["class_type"], node["inputs"]) for key, node in graph.items()}


def resources(server: ComfyServer) -> dict[str, int]:
    process = Path(f"/proc/{server.pid}")
    return {"bytes": server.rss_bytes(), "threads": len(list((process / "task").iterdir())), "files": len(list((process / "fd").iterdir()))}


def run_prompts(server: ComfyServer, count: int) -> dict[str, Any]:
    """Runs them one after another; returns how they ended and the resources after the warm-up and in the end."""
    rng = random.Random(0)
    ends: Counter[str] = Counter()
    saved: list[tuple[Path, Graph]] = []
    warm: dict[str, int] = {}
    for number in range(count):
        graph = random_graph(rng)
        result = server.run(graph, on_event=interrupt_after(server, rng.randint(1, 6)) if rng.random() < INTERRUPTED else None)
        assert result.status in ("success", "interrupted"), (result.error, server.log()[-3000:])
        ends[result.status] += 1
        for node in result.outputs.values():
            saved += [(server.base_directory / image["type"] / image["subfolder"] / image["filename"], graph)
                      for image in node.get("images", []) if image["type"] == "output"]  # fmt: skip
        if number % FREED_EVERY == FREED_EVERY - 1:
            server.post("/free", {"unload_models": True, "free_memory": True})
        if number + 1 == WARM_UP:
            warm = resources(server)
    for file, graph in saved:
        with Image.open(file) as image:
            image.load()
            assert inputs(json.loads(image.text["prompt"])) == inputs(graph), file
    return {"ends": dict(ends), "pictures": len(saved), "warm": warm, "end": resources(server)}


@pytest.mark.timeout(3600, func_only=True)
@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.nightly)])
def test_nothing_grows_and_nothing_is_lost(server: ComfyServer, count: int) -> None:
    server.base_directory.joinpath("input").mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), "orange").save(server.base_directory / "input" / "example.png")
    found = run_prompts(server, count)
    warm, end = found["warm"], found["end"]
    print(f"\nComfyUI {server.host.version}: {count} prompts ended {found['ends']}, {found['pictures']} pictures; resident "
          f"{warm['bytes'] / 2**20:.0f} -> {end['bytes'] / 2**20:.0f} MiB, threads {warm['threads']} -> {end['threads']}, "
          f"open files {warm['files']} -> {end['files']}")  # fmt: skip
    assert found["ends"]["interrupted"] >= 0.05 * count
    assert end["bytes"] <= (1 + GROWTH) * warm["bytes"]
    assert end["threads"] <= warm["threads"] + 2 and end["files"] <= warm["files"] + 2
