"""The workflow files that ship open on every host: in the template browser (UI format) and over HTTP (API format)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ..nodes.schemas import read_schemas
from ..nodes.workflow_files import blueprint_to_api, check_layout, to_api
from .comfy_server import ComfyServer
from .hosts import REPOSITORY

UI_FILES = sorted((REPOSITORY / "workflows").glob("*.json"))
API_FILES = sorted((REPOSITORY / "workflows" / "api").glob("*.json"))
BLUEPRINTS = sorted((REPOSITORY / "subgraphs").glob("*.json"))
BOXED = {"BLIP3-o Text to Image": "text_to_image", "BLIP3-o Edit": "image_editing", "BLIP3-o Ask": "image_understanding"}

Workflow = dict[str, Any]


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text("utf-8"))


def by_name(file: Path) -> str:
    return file.stem


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict[str, dict[str, Any]]:
    return server.object_info()


def test_every_workflow_comes_in_both_formats() -> None:
    assert UI_FILES
    assert [file.name for file in UI_FILES] == [file.name for file in API_FILES]


@pytest.mark.parametrize("file", API_FILES, ids=by_name)
def test_every_node_of_a_workflow_is_known_to_the_host(file: Path, object_info: dict) -> None:
    assert {node["class_type"] for node in read(file).values()} <= object_info.keys()


@pytest.mark.parametrize("file", UI_FILES, ids=by_name)
def test_a_workflow_says_the_same_in_both_formats(file: Path, object_info: dict) -> None:
    api = read(file.parent / "api" / file.name)
    for node in api.values():
        node.pop("_meta", None)
    assert to_api(read(file), object_info) == api


@pytest.mark.parametrize("file", UI_FILES, ids=by_name)
def test_nodes_of_a_workflow_lie_side_by_side(file: Path) -> None:
    check_layout(read(file))


@pytest.mark.parametrize("file", UI_FILES, ids=by_name)
def test_a_workflow_has_a_picture_and_says_which_files_go_where(file: Path) -> None:
    with Image.open(file.with_suffix(".jpg")) as picture:
        picture.load()
        assert min(picture.size) >= 384 and file.with_suffix(".jpg").stat().st_size < 100_000
    notes = " ".join(str(node["widgets_values"]) for node in read(file)["nodes"] if node["type"] == "MarkdownNote")
    assert "models/blip3o" in notes and "huggingface.co" in notes


def test_every_node_is_used_in_a_workflow() -> None:
    used = {node["class_type"] for file in API_FILES for node in read(file).values()}
    assert {schema.node_id for schema in read_schemas()} <= used


@pytest.mark.parametrize("file", BLUEPRINTS, ids=by_name)
def test_a_blueprint_is_the_shipped_workflow_in_a_box(file: Path, object_info: dict, server: ComfyServer) -> None:
    """But for what is outside of the box: the picture that goes in, what is done with the one that comes out, and the seed."""
    offered = {entry["name"] for entry in server.get("/global_subgraphs").values() if entry["info"]["node_pack"].endswith(server.folder)}
    assert offered == {file.stem for file in BLUEPRINTS}
    graph, sockets = blueprint_to_api(read(file), object_info)
    whole = read(API_FILES[0].parent / f"{BOXED[file.stem]}.json")
    [seed] = [key for key, node in graph.items() if node["class_type"] == "PrimitiveInt"] or [None]
    for key, node in graph.items():
        if key == seed:
            continue
        expected = {**whole[key]["inputs"]}
        for name, value in node["inputs"].items():
            if value == [seed, 0]:
                assert graph[seed]["inputs"]["value"] == expected.pop(name)
        found = {name: value for name, value in node["inputs"].items() if value != [seed, 0]}
        for name in [name for node_id, name in sockets if node_id == key]:
            assert whole[expected.pop(name)[0]]["class_type"] == "LoadImage"
        assert found == expected, key
    left_out = {whole[key]["class_type"] for key in whole.keys() - graph.keys()}
    assert left_out <= {"LoadImage", "SaveImage", "PreviewAny", "Blip3oAsk"}


def drop_a_link(workflow: Workflow) -> None:
    workflow["links"].pop()


def lead_a_link_to_another_node(workflow: Workflow) -> None:
    workflow["links"][0][3] = 999


def forget_a_link_at_its_output(workflow: Workflow) -> None:
    node(workflow, "VAEDecode")["outputs"][0]["links"] = None


def take_pixels_for_a_latent(workflow: Workflow) -> None:
    node(workflow, "VAEDecode")["outputs"][0]["type"] = "LATENT"


def forget_what_happens_to_the_seed(workflow: Workflow) -> None:
    node(workflow, "SamplerCustom")["widgets_values"].remove("fixed")


def swap_seed_and_its_control(workflow: Workflow) -> None:
    values = node(workflow, "SamplerCustom")["widgets_values"]
    values[1:3] = reversed(values[1:3])


def rename_an_input(workflow: Workflow) -> None:
    node(workflow, "Blip3oTextEncode")["inputs"][1]["name"] = "text"


def use_a_node_of_another_pack(workflow: Workflow) -> None:
    node(workflow, "KSamplerSelect")["type"] = "NoSuchNode"


def bypass_a_node(workflow: Workflow) -> None:
    node(workflow, "VAEDecode")["mode"] = 4


DAMAGES = {
    drop_a_link: "dangles, link",
    lead_a_link_to_another_node: "ends at a node that is not there",
    forget_a_link_at_its_output: "is not listed at IMAGE",
    take_pixels_for_a_latent: "joins LATENT .* and IMAGE",
    forget_what_happens_to_the_seed: "has 3 widgets_values, not 4",
    swap_seed_and_its_control: "a seed is not followed by",
    rename_an_input: r"has the inputs .*'text'.*, the host .*'prompt'",
    use_a_node_of_another_pack: "the host has no such node",
    bypass_a_node: "muted or bypassed",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.items(), ids=[damage.__name__ for damage in DAMAGES])
def test_a_damaged_workflow_is_told_from_a_sound_one(
    damage: Callable[[Workflow], None], message: str, object_info: dict
) -> None:
    workflow = read(REPOSITORY / "workflows" / "text_to_image.json")
    damage(workflow)
    with pytest.raises(AssertionError, match=message):
        to_api(workflow, object_info)


def test_a_link_is_followed_through_a_reroute(object_info: dict) -> None:
    workflow = read(REPOSITORY / "workflows" / "text_to_image.json")
    straight = to_api(workflow, object_info)
    link = next(link for link in workflow["links"] if link[5] == "IMAGE")
    reroute = {"id": 900, "type": "Reroute", "mode": 0, "inputs": [{"name": "", "type": "*", "link": link[0]}],
               "outputs": [{"name": "", "type": "IMAGE", "links": [900]}]}  # fmt: skip
    workflow["nodes"].append(reroute)
    workflow["links"].append([900, 900, 0, link[3], link[4], "IMAGE"])
    node(workflow, "SaveImage")["inputs"][link[4]]["link"] = 900
    link[3:] = [900, 0, "*"]
    workflow["last_node_id"] = workflow["last_link_id"] = 900
    assert to_api(workflow, object_info) == straight


def test_nodes_on_top_of_each_other_are_noticed() -> None:
    workflow = read(REPOSITORY / "workflows" / "text_to_image.json")
    below, x = node(workflow, "VAEDecode"), node(workflow, "SaveImage")["pos"][0]
    below["pos"] = [x, node(workflow, "SaveImage")["pos"][1] - below["size"][1] - 1]  # only the title bar is in the way
    with pytest.raises(AssertionError, match="overlaps"):
        check_layout(workflow)


def test_a_node_across_the_edge_of_a_group_is_noticed() -> None:
    workflow = read(REPOSITORY / "workflows" / "text_to_image.json")
    workflow["groups"][0]["bounding"][2] -= 60
    with pytest.raises(AssertionError, match="lies across the edge of group '1 Understand the prompt'"):
        check_layout(workflow)


def node(workflow: Workflow, node_type: str) -> dict[str, Any]:
    """The first node of a type."""
    return next(entry for entry in workflow["nodes"] if entry["type"] == node_type)
