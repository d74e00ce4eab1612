"""Every workflow as it is shipped, on nano: nothing is changed, nothing is downloaded."""

import shutil

import pytest
from PIL import Image

from blip3o_core.lora.files import write_lora
from blip3o_core.nano.sizes import PICTURE_SIDE
from blip3o_core.shapes.world import Object, Scene, render
from blip3o_core.variants.blip3o import NANO_FOLDER, Blip3oCheckpoint

from ..unit.lora_samples import random_lora
from . import graphs
from .comfy_server import ComfyServer
from .hosts import REPOSITORY

NAMES = graphs.names()
SCENE = Scene((Object("circle", "red", "large", (0.3, 0.4)), Object("square", "blue", "large", (0.7, 0.6))), "white")


@pytest.fixture(scope="module")
def server(server: ComfyServer) -> ComfyServer:
    """With a picture of shapes as example.png, and a LoRA file of the name in the workflow."""
    folder = server.base_directory / "input"
    folder.mkdir(exist_ok=True)
    render(SCENE).save(folder / "example.png")
    loras = server.base_directory / "models" / "loras"
    loras.mkdir(exist_ok=True)
    write_lora(loras / "blip3o_lora.safetensors", random_lora(Blip3oCheckpoint.open(NANO_FOLDER)))
    return server


def test_nano_is_offered_without_any_file_in_the_model_folders(server):
    info = server.object_info()
    for node, widget in (("Blip3oCheckpointLoader", "checkpoint"), ("Blip3oSDXLDecoderLoader", "decoder"),
                         ("Blip3oVisionEncoderLoader", "vision_encoder")):  # fmt: skip
        spec = info[node]["input"]["required"][widget]
        choices = spec[0] if isinstance(spec[0], list) else spec[1]["options"]
        assert "nano" in choices
    assert not list((server.base_directory / "models" / "blip3o").glob("nano"))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_workflow_runs_on_nano_as_it_is(server, name):
    graph = graphs.shipped(name)
    result = server.run(graph)
    assert result.status == "success", result.error
    for key, node in graph.items():
        if node["class_type"] == "SaveImage":
            [image] = server.images(result, key)
            assert image.size == (PICTURE_SIDE, PICTURE_SIDE)
            assert len(set(image.convert("RGB").resize((16, 16), Image.Resampling.BOX).getdata())) > 1, "not one colour"
        if node["class_type"] == "PreviewAny":
            assert "".join(result.outputs[key]["text"]), "an answer"


def test_a_folder_called_nano_goes_before_the_packaged_one(server, tmp_path):
    own = server.base_directory / "models" / "blip3o" / "nano"
    shutil.copytree(REPOSITORY / "tests" / "data" / "sdxl" / "checkpoint", own)
    try:
        result = server.run(graphs.text_to_image(checkpoint="nano"))
        assert result.status == "success", result.error
        [image] = server.images(result, graphs.find(graphs.text_to_image(), "SaveImage"))
        assert image.size == (graphs.SIDE, graphs.SIDE)
    finally:
        shutil.rmtree(own)
