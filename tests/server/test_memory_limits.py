"""Memory runs out in each stage, really: the server may take no more, and is asked for a large picture or batch.

The error names the stage and what takes less, and the next prompt runs.
"""

import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from . import graphs
from .comfy_server import ComfyServer, Event, Result
from .graphs import Graph, empty_image

MIB = 2**20
LARGE = 3072
"""Side of a picture of 108 MiB, as the host keeps it."""
ENOUGH_FOR_CORE = 800 * MIB
"""What core's sampler takes for 4096 embeddings before it calls the model, and not what the model takes."""
HUGE, HUGE_LATENT = 1024, 4096
"""Sides of pictures whose activations take 32 MiB and more each: for those, memory that was freed before is not used again."""


@contextmanager
def memory_limit(server: ComfyServer, more_bytes: int) -> Iterator[Callable[[Event], None]]:
    """The server's address space may grow by so much, until it reports how the graph ended: what it gives is for `ComfyServer.run`."""
    pages = int(Path(f"/proc/{server.pid}/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    unlimited = resource.prlimit(server.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def lift(event: Event) -> None:
        if event["type"] in ("execution_error", "execution_success"):
            resource.prlimit(server.pid, resource.RLIMIT_AS, unlimited)

    try:
        yield lift
    finally:
        resource.prlimit(server.pid, resource.RLIMIT_AS, unlimited)


def previewed(source: str = "image") -> Graph:
    return {"preview": {"class_type": "PreviewImage", "inputs": {"images": [source, 0]}}}


def encode_large_picture() -> Graph:
    graph = graphs.embedding_only(1)
    graph[graphs.PROMPT]["inputs"].update(images=["image", 0], image_size="original")
    return graph


def ask_about_large_picture() -> Graph:
    return graphs.ask("What is this?", images=["image", 0], max_pixels=12845056)


def embed_large_picture() -> Graph:
    return {
        "encoder": {"class_type": "Blip3oVisionEncoderLoader", "inputs": {"vision_encoder": graphs.EVA}},
        "embed": {"class_type": "Blip3oImageEncode", "inputs": {"vision_encoder": ["encoder", 0], "images": ["image", 0]}},
        "save": graphs.save_latent(["embed", 0]),
    }


def run_in_little_memory(server: ComfyServer, graph: Graph, before: Graph, more_bytes: int) -> Result:
    """Runs `before` as it likes, which is cached, then `graph`."""
    assert server.run(before).status == "success", server.log()[-2000:]
    with memory_limit(server, more_bytes) as lift:
        return server.run(graph, on_event=lift)


def expect_advice(server: ComfyServer, result: Result, node_type: str, stage: str, advice: str) -> None:
    assert result.status == "error", server.log()[-2000:]
    message = result.error["exception_message"]
    assert (result.error["node_type"], stage in message, advice in message) == (node_type, True, True), message
    next_run = server.run(graphs.replace_inputs(graphs.text_to_image(seed=2), steps=2))
    assert next_run.status == "success", (next_run.error, server.log()[-2000:])


@pytest.mark.parametrize(
    ("graph", "node_type", "stage", "advice"),
    [
        (encode_large_picture(), "Blip3oTextEncode", "out of memory while reading the prompt", "blip3o quantize"),
        (ask_about_large_picture(), "Blip3oAsk", "out of memory while answering", "fewer or smaller pictures"),
        (embed_large_picture(), "Blip3oImageEncode", "out of memory while encoding pictures", "fewer or smaller pictures"),
    ],
    ids=["prompt", "answer", "embed"],
)
def test_a_large_picture(server: ComfyServer, graph: Graph, node_type: str, stage: str, advice: str) -> None:
    image = {"image": empty_image(LARGE, LARGE)}
    loaders = {key: node for key, node in graph.items() if node["class_type"].endswith("Loader")}
    result = run_in_little_memory(server, {**loaders, **image, **graph}, {**image, **previewed()}, 24 * MIB)
    expect_advice(server, result, node_type, stage, advice)


def test_many_embeddings(server: ComfyServer) -> None:
    large = graphs.embedding_only(2, noise_seed=3)
    key = graphs.find(large, "Blip3oEmptyEmbedding")
    large[key]["inputs"]["batch_size"] = 256
    large["many"] = {"class_type": "RepeatLatentBatch", "inputs": {"samples": [key, 0], "amount": 16}}
    large[graphs.EMBEDDING]["inputs"]["latent_image"] = ["many", 0]
    first = {"class_type": "LatentFromBatch", "inputs": {"samples": ["many", 0], "batch_index": 0, "length": 1}}
    before = {name: node for name, node in large.items() if name not in (graphs.EMBEDDING, "save")}
    before |= {"first": first, "kept": graphs.save_latent(["first", 0])}
    result = run_in_little_memory(server, large, before, ENOUGH_FOR_CORE)
    expect_advice(server, result, "SamplerCustom", "out of memory while sampling embeddings", "a smaller batch_size")


def test_a_large_picture_is_drawn(server: ComfyServer) -> None:
    large = graphs.replace_inputs(graphs.text_to_image(seed=4, side=HUGE), steps=1)
    result = run_in_little_memory(server, large, graphs.replace_inputs(graphs.text_to_image(seed=4), steps=1), 40 * MIB)
    expect_advice(server, result, "SamplerCustom", "out of memory while drawing", "a smaller width, height or batch_size")


def test_a_large_picture_is_decoded(server: ComfyServer) -> None:
    """The host tries tiles by itself before it gives up, and may have enough for them."""
    loaded = graphs.replace_inputs(graphs.text_to_image(seed=5), steps=1)
    large = {key: loaded[key] for key in (graphs.DECODER,)}
    large["latent"] = {"class_type": "EmptyLatentImage", "inputs": {"width": HUGE_LATENT, "height": HUGE_LATENT, "batch_size": 1}}
    large["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["latent", 0], "vae": [graphs.DECODER, 1]}}
    result = run_in_little_memory(server, {**large, **previewed("decode")}, loaded, 64 * MIB)
    assert "Ran out of memory when regular VAE decoding, retrying with tiled VAE decoding" in server.log()
    if result.status == "error":
        expect_advice(server, result, "VAEDecode", "out of memory while decoding the picture", "VAE Decode (Tiled)")


def test_a_model_is_opened(server: ComfyServer) -> None:
    assert server.run(graphs.embedding_only(1)).status == "success"
    server.post("/free", {"unload_models": True, "free_memory": True})
    with memory_limit(server, MIB) as lift:
        result = server.run(graphs.replace_inputs(graphs.embedding_only(1), checkpoint="nano"), on_event=lift)
    expect_advice(server, result, "Blip3oCheckpointLoader", "out of memory while opening the model", "8 or 4 bits")
