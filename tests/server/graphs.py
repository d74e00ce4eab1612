"""API-format graphs for the tests: the shipped ones on the tiny checkpoint, and what tests make of them."""

import copy
import json
from typing import Any

from .hosts import REPOSITORY

TINY, EVA = "tiny", "eva"
SANA = "reconstruction_sana"
"""The graph that needs a decoder which is neither in nano nor in the tiny checkpoint; test_sana.py runs it."""
SIDE = 64
FEW_STEPS, FEW_TOKENS = 3, 8
LOADER, PROMPT, EMBEDDING, DECODER, CONDITIONING, SIZE, PICTURE = "1", "2", "6", "10", "11", "12", "14"
SCHEDULE, PICTURE_SCHEDULE = "4", "13"

Graph = dict[str, dict[str, Any]]


def names() -> list[str]:
    """Of all shipped graphs but SANA."""
    return sorted(file.stem for file in (REPOSITORY / "workflows" / "api").glob("*.json") if file.stem != SANA)


def shipped(name: str = "text_to_image") -> Graph:
    """A graph of workflows/api as it is shipped."""
    return json.loads((REPOSITORY / "workflows" / "api" / f"{name}.json").read_text("utf-8"))


def text_to_image(prompt: str | None = None, seed: int | None = None, checkpoint: str = TINY, side: int = SIDE) -> Graph:
    """The shipped graph with the tiny checkpoint, small pictures and the settings of the reference; nothing else is changed."""
    graph = replace_inputs(with_euler(reference(shipped())), checkpoint=checkpoint, decoder=checkpoint, width=side, height=side)
    if prompt is not None:
        graph[PROMPT]["inputs"]["prompt"] = prompt
    if seed is not None:
        graph[EMBEDDING]["inputs"]["noise_seed"] = graph[PICTURE]["inputs"]["noise_seed"] = seed
    return graph


def tiny(name: str) -> Graph:
    """A shipped graph with the tiny models, small pictures, few steps and few tokens; seeds, texts and links stay."""
    return replace_inputs(reference(shipped(name)), checkpoint=TINY, decoder=TINY, vision_encoder=EVA, width=SIDE, height=SIDE,
                          steps=FEW_STEPS, max_new_tokens=FEW_TOKENS)  # fmt: skip


def reference(graph: Graph) -> Graph:
    """The reference's settings in place of nano's: pictures in 50 steps, with guidance 3. In place."""
    for node in graph.values():
        if node["class_type"] == "SamplerCustom":
            node["inputs"]["cfg"] = 3.0
        if node["class_type"] == "Blip3oScheduler" and node["inputs"]["stage"] == "picture":
            node["inputs"]["steps"] = 50
    return graph


def with_euler(graph: Graph) -> Graph:
    """The reference's solver of the embedding in place of ours. In place."""
    for node in graph.values():
        if node["class_type"] == "SamplerDPMPP_2M_SDE":
            node.update(class_type="KSamplerSelect", inputs={"sampler_name": "euler"})
        if node["class_type"] == "Blip3oScheduler" and node["inputs"]["stage"] == "embedding":
            node["inputs"].update(steps=30, schedule="linear")
    return graph


def replace_inputs(graph: Graph, **values: Any) -> Graph:
    """Sets inputs of these names to a value wherever a node has them and nothing is linked to them. In place."""
    for node in graph.values():
        inputs = node["inputs"]
        inputs.update({name: value for name, value in values.items() if not isinstance(inputs.get(name, []), list)})
    return graph


def find(graph: Graph, class_type: str, title: str | None = None) -> str:
    """The id of the only node of this class (and title)."""
    [key] = [key for key, node in graph.items()
             if node["class_type"] == class_type and title in (None, node["_meta"]["title"])]  # fmt: skip
    return key


def ask(question: str, *, checkpoint: str = TINY, **inputs: Any) -> Graph:
    """One question; "images" may be linked to nodes that the test adds. The node "ask" shows the answers, "text" each by itself."""
    settings = shipped("image_understanding")
    settings = settings[find(settings, "Blip3oAsk", "Your own question")]["inputs"]
    del settings["images"]
    settings.update(backbone=["loader", 0], question=question, max_new_tokens=FEW_TOKENS)
    return {
        "loader": {"class_type": "Blip3oCheckpointLoader", "inputs": {"checkpoint": checkpoint}},
        "ask": {"class_type": "Blip3oAsk", "inputs": settings | inputs},
        "text": {"class_type": "PreviewAny", "inputs": {"source": ["ask", 0]}},
    }


def encode_image(image: list, *, vision_encoder: str = EVA) -> Graph:
    """Both embeddings of Image Encode, saved by the nodes "embedding" and "null"."""
    return {
        "loader": {"class_type": "Blip3oVisionEncoderLoader", "inputs": {"vision_encoder": vision_encoder}},
        "encode": {"class_type": "Blip3oImageEncode", "inputs": {"vision_encoder": ["loader", 0], "images": image}},
        "embedding": save_latent(["encode", 0]),
        "null": save_latent(["encode", 1], "null"),
    }


def load_image(file: str = "example.png") -> dict[str, Any]:
    return {"class_type": "LoadImage", "inputs": {"image": file}}


def empty_image(width: int, height: int, batch_size: int = 1) -> dict[str, Any]:
    """Pictures of one colour."""
    return {"class_type": "EmptyImage", "inputs": {"width": width, "height": height, "batch_size": batch_size, "color": 0x3366CC}}


def embedding_only(steps: int | None = 4, **changes: Any) -> Graph:
    """The first stage alone; the embedding is saved as output/embedding_*.latent. `changes` go to the sampler node.

    steps: of the reference's euler; None keeps sampler and steps as shipped.
    """
    whole = text_to_image() if steps is not None else replace_inputs(shipped(), checkpoint=TINY)
    graph = {key: copy.deepcopy(node) for key, node in whole.items() if key in ("1", "2", "3", "4", "5", "6")}
    if steps is not None:
        graph[SCHEDULE]["inputs"]["steps"] = steps
    graph[EMBEDDING]["inputs"].update(changes)
    graph["save"] = save_latent([EMBEDDING, 0])
    return graph


def save_latent(source: list, prefix: str = "embedding") -> dict[str, Any]:
    return {"class_type": "SaveLatent", "inputs": {"samples": source, "filename_prefix": prefix}}
