"""The pack loads in ComfyUI, whatever its folder is called, and leaves the rest of ComfyUI as it was."""

import json
from collections.abc import Iterator

import pytest

from .comfy_server import ComfyServer, PromptRejected
from .hosts import REPOSITORY, Host


@pytest.fixture(scope="module", params=["ComfyUI-BLIP3o", "some other name"])
def server(
    request: pytest.FixtureRequest, host: Host, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    with ComfyServer(host, tmp_path_factory.mktemp("comfyui"), folder=request.param) as running:
        yield running


def test_the_host_is_the_version_it_claims_to_be(server: ComfyServer) -> None:
    assert server.get("/system_stats")["system"]["comfyui_version"] == server.host.version


def test_nothing_fails_to_import(server: ComfyServer) -> None:
    log = server.log()
    assert "Import times for custom nodes:" in log  # else the pack was not even tried
    assert [line for line in log.splitlines() if "IMPORT FAILED" in line] == []


def test_the_nodes_of_the_pack_come_from_its_folder(server: ComfyServer) -> None:
    modules = {node_id: info["python_module"] for node_id, info in server.object_info().items()}
    ours = {node_id for node_id, module in modules.items() if module == f"custom_nodes.{server.folder}"}
    assert ours
    assert ours == {node_id for node_id in modules if node_id.startswith("Blip3o")}


def test_every_language_of_the_pack_is_served(server: ComfyServer) -> None:
    served = server.get("/i18n")
    for folder in (REPOSITORY / "locales").iterdir():
        definitions = json.loads((folder / "nodeDefs.json").read_text("utf-8"))
        assert definitions.items() <= served[folder.name]["nodeDefs"].items(), folder.name
        assert set(definitions) == {name for name in server.object_info() if name.startswith("Blip3o")}


def test_core_nodes_are_still_there(server: ComfyServer) -> None:
    core = {"KSampler", "VAEDecode", "SaveImage", "LoraLoaderModelOnly", "ConditioningZeroOut"}
    assert core <= server.object_info().keys()


def test_a_core_graph_runs(server: ComfyServer) -> None:
    result = server.run(image_graph(width=48, height=32, color=0xFF0000))
    assert result.status == "success"
    [image] = server.images(result, "2")
    assert (image.size, image.getpixel((0, 0))) == ((48, 32), (255, 0, 0))


def test_an_invalid_graph_is_rejected_with_the_node_at_fault(server: ComfyServer) -> None:
    with pytest.raises(PromptRejected, match="value_smaller_than_min") as rejection:
        server.run(image_graph(width=0, height=32, color=0))
    assert rejection.value.node_errors.keys() == {"1"}


def image_graph(*, width: int, height: int, color: int) -> dict[str, dict]:
    """An image of one colour (0xRRGGBB), saved by node 2."""
    size = {"width": width, "height": height, "batch_size": 1}
    return {
        "1": {"class_type": "EmptyImage", "inputs": {**size, "color": color}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "boot"}},
    }
