"""The SigLIP2 + SANA decoder on native sockets: the shipped workflow draws what the headless pipeline draws."""

import shutil
from collections.abc import Iterator

import pytest
import torch
from PIL import Image

from blip3o_core import Blip3oPipeline

from . import graphs
from .comfy_server import ComfyServer
from .conftest import DATA
from .hosts import Host
from .test_text_to_image import as_tensor

FOLDER = "SigLIP2_SANA"  # as in the workflow
CHECKPOINT = DATA.parent / "sana" / "checkpoint"
SIDE = 16  # of the tiny decoder
STEPS = 6


@pytest.fixture(scope="module")
def server(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    models = {f"blip3o/{FOLDER}": CHECKPOINT, "blip3o/tiny": DATA / "checkpoint", "blip3o/eva": DATA / "eva_clip_vision_tower"}
    with ComfyServer(host, tmp_path_factory.mktemp("comfyui"), models=models) as running:
        (running.base_directory / "input").mkdir(exist_ok=True)
        shutil.copy(DATA / "image.png", running.base_directory / "input" / "example.png")
        yield running


@pytest.fixture(scope="module")
def pipe() -> Blip3oPipeline:
    return Blip3oPipeline.from_pretrained(DATA / "checkpoint", device="cpu", dtype=torch.float32, decoder=CHECKPOINT)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    with Image.open(DATA / "image.png") as image:
        return image.convert("RGB")


def workflow(**changes) -> graphs.Graph:
    graph = graphs.replace_inputs(graphs.shipped(graphs.SANA), steps=STEPS, **changes)
    graph[graphs.find(graph, "EmptyLatentImage")]["inputs"].update(width=SIDE, height=SIDE)
    return graph


def drawn(server: ComfyServer, graph: graphs.Graph) -> torch.Tensor:
    result = server.run(graph)
    assert result.status == "success", result.error
    [image] = server.images(result, graphs.find(graph, "SaveImage"))
    return as_tensor(image)


def test_the_workflow_draws_the_headless_picture(server, pipe, picture):
    found = drawn(server, workflow())
    [headless] = pipe.reconstruct(picture, seeds=[0], steps=STEPS)
    assert (found - as_tensor(headless)).abs().max() <= 2 / 255


@torch.inference_mode()
def test_euler_and_plain_positions_are_the_headless_ones_too(server, picture):
    graph = workflow(positions="none", scheduler="euler", stage="embedding")
    sampler = graphs.find(graph, "SamplerDPMPP_2M_SDE")
    graph[sampler] = {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}}
    other = Blip3oPipeline.from_pretrained(DATA / "checkpoint", device="cpu", dtype=torch.float32, decoder=CHECKPOINT,
                                           sana_positions="none", decoder_scheduler="euler")  # fmt: skip
    [headless] = other.reconstruct(picture, seeds=[0], steps=STEPS)
    assert (drawn(server, graph) - as_tensor(headless)).abs().max() <= 2 / 255


def test_tiles_are_decoded_and_core_schedulers_work(server, pipe):
    graph = workflow()
    decode, scheduler = graphs.find(graph, "VAEDecode"), graphs.find(graph, "Blip3oScheduler")
    graph[decode]["class_type"] = "VAEDecodeTiled"
    graph[decode]["inputs"].update(tile_size=64, overlap=0, temporal_size=64, temporal_overlap=8)
    loader = graphs.find(graph, "Blip3oSANADecoderLoader")
    graph[scheduler] = {"class_type": "BasicScheduler", "inputs": {"model": [loader, 0], "scheduler": "simple", "steps": 4, "denoise": 1.0}}
    assert drawn(server, graph).isfinite().all()


def test_an_embedding_of_the_other_encoder_is_refused(server):
    result = server.run(workflow(vision_encoder="eva"))
    assert result.status == "error" and result.error["node_type"] == "SamplerCustom"
    assert "the SANA decoder draws SigLIP2 embeddings of width 64, the conditioning has width 48" in result.error["exception_message"]
    assert drawn(server, workflow()).isfinite().all()


def test_the_folder_is_offered_where_it_fits(server):
    info = server.object_info()

    def choices(node: str, widget: str) -> list[str]:
        spec = info[node]["input"]["required"][widget]
        return spec[0] if isinstance(spec[0], list) else spec[1]["options"]

    assert choices("Blip3oSANADecoderLoader", "decoder") == [FOLDER]
    assert FOLDER in choices("Blip3oVisionEncoderLoader", "vision_encoder")
    assert FOLDER not in choices("Blip3oCheckpointLoader", "checkpoint") + choices("Blip3oSDXLDecoderLoader", "decoder")
