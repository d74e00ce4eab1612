"""What a workflow can't do, on real servers: leave the folders of models, run what is in a file, or make more of a text than a text.

A name is tried as a constant, which the host compares with its list, and by a link, which it can't: there our own look-up decides.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from blip3o_core.lora.files import write_lora
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from ..server.comfy_server import ComfyServer, PromptRejected
from ..server.hosts import prepare_host, selected_hosts
from ..unit.lora_samples import random_lora
from .payload import PICKLES, write_pickle

DATA = Path(__file__).parents[1] / "data"
CHECKPOINT, EVA = DATA / "sdxl" / "checkpoint", DATA / "sdxl" / "eva_clip_vision_tower"
PICKS = {
    "Blip3oCheckpointLoader": ("checkpoint", "qwen"), "Blip3oSDXLDecoderLoader": ("decoder",), "Blip3oSANADecoderLoader": ("decoder",),
    "Blip3oVisionEncoderLoader": ("vision_encoder",), "Blip3oLoraLoader": ("lora_name",),
}  # fmt: skip
"""Node -> its inputs that name a folder or a file. Nothing else in this package takes a path from a prompt."""
EACH_PICK = [(node, name) for node, inputs in PICKS.items() for name in inputs]


@pytest.fixture(scope="module", params=selected_hosts(), ids=lambda spec: spec.name)
def server(request, tmp_path_factory) -> Iterator[ComfyServer]:
    """Beside its models lies a whole checkpoint called secret; links lead to it, around in a circle, and to nowhere."""
    base = tmp_path_factory.mktemp("security") / "comfyui"
    models, secret = base / "models", base.parent / "secret"
    shutil.copytree(CHECKPOINT, secret)
    shutil.copy(secret / "model.safetensors", base.parent / "secret.safetensors")
    shutil.copytree(CHECKPOINT, models / "blip3o" / "owner" / "model")
    (models / "loras" / "sub").mkdir(parents=True)
    shutil.copy(secret / "model.safetensors", models / "loras" / "sub" / "a.safetensors")
    links = {"linked": secret, "loop": models / "blip3o", "nowhere": base / "no such folder", "self": "self"}  # two circles hang the host
    for name, target in links.items():
        (models / "blip3o" / name).symlink_to(target)
    (models / "loras" / "nowhere.safetensors").symlink_to(base / "no such file")
    os.mkdir(os.fsencode(models / "blip3o") + b"/\xff\xfe")  # no text in any encoding
    linked = {"blip3o/eva": EVA, "clip_vision/eva.bin": EVA / "pytorch_model.bin"}
    with ComfyServer(prepare_host(request.param), base, models=linked) as running:
        yield running


def names(server: ComfyServer) -> list[str]:
    """Ways out, in the notations of several systems."""
    outside, inside = server.base_directory.parent / "secret", server.base_directory / "models" / "blip3o"
    return [
        "../../../secret", "../../../secret.safetensors", "owner/../../../../secret", "owner/model/../../../../../secret",
        "owner/model/../model", "./owner/model", "owner//model", "owner/model/", "owner/model/.", "owner\\model", "..\\..\\..\\secret",
        str(outside), f"{outside}.safetensors", str(outside / "model.safetensors"), str(inside / "owner" / "model"), f"file://{outside}",
        f"/{outside}", "/owner/model", "~/secret", "$HOME/secret", "C:\\secret", "C:/secret", "C:secret", f"\\\\?\\{outside}",
        "\\\\host\\share\\secret", "//host/share/secret", "CON", "NUL", "linked/../secret", "linked/diffusion-decoder/unet",
        "linked/diffusion-decoder/..", "loop/loop/owner/model", "loop/../../../secret", "nowhere", "self", "nowhere.safetensors",
        "clip_vision/../blip3o/owner/model", f"clip_vision/{outside}", "clip_vision//etc/passwd", "clip_vision/../../../secret.safetensors",
        "sub/../../../../secret.safetensors", "sub/../sub/a.safetensors", "owner/model\0", "owner/model\0.safetensors", "OWNER/MODEL",
        " owner/model", "owner/model ", "owner%2Fmodel", "owner/\u2024\u2024/model", "", ".", "..", "/", "/etc", "/etc/passwd",
        "/dev/stdin", "/proc/self/environ", "nano/..",
    ]  # fmt: skip


def graph(node: str, name: object, picked: str | None = None) -> dict:
    """The node with this name in an input (its first), what it needs, and something that shows what it returns."""
    inputs = {picked or PICKS[node][0]: name}
    if picked == "qwen":
        inputs["checkpoint"] = "owner/model"
    parts = {"target": {"class_type": node, "inputs": inputs}, "shown": {"class_type": "PreviewAny", "inputs": {"source": ["target", 0]}}}
    if node == "Blip3oSANADecoderLoader":
        inputs.update(positions="automatic", scheduler="automatic")
    if node == "Blip3oLoraLoader":
        inputs.update(model=["model", 1], strength_model=1.0, strength_backbone=1.0, allow_other_base=False)
        parts["model"] = {"class_type": "Blip3oCheckpointLoader", "inputs": {"checkpoint": "owner/model"}}
    return parts


def as_constant(node: str, name: str, picked: str | None = None) -> dict:
    return graph(node, name, picked)


def by_link(node: str, name: str, picked: str | None = None) -> dict:
    """Through a node of core that passes on whatever it gets."""
    text = {"class_type": "PrimitiveString", "inputs": {"value": name}}
    switch = {"class_type": "ComfySwitchNode", "inputs": {"switch": True, "on_false": ["text", 0], "on_true": ["text", 0]}}
    return graph(node, ["switch", 0], picked) | {"text": text, "switch": switch}


@pytest.mark.parametrize("way", [as_constant, by_link])
@pytest.mark.parametrize(("node", "picked"), EACH_PICK)
def test_a_name_that_is_not_listed_opens_nothing(server, node, picked, way: Callable[[str, str, str], dict]):
    listed = offered(server, node, picked)
    for name in names(server):
        if name in listed:
            continue
        try:
            result = server.run(way(node, name, picked), timeout_s=60)
        except PromptRejected:
            continue
        assert result.status == "error", name
        assert result.error["exception_type"].endswith("CheckpointError"), (name, result.error)
        assert "(any more). P" in result.error["exception_message"], name  # the look-up says so; no file was opened
    assert server.is_alive()


def offered(server: ComfyServer, node: str, picked: str | None = None) -> list[str]:
    described = server.object_info()[node]["input"]
    kind, *rest = {**described["required"], **described.get("optional", {})}[picked or PICKS[node][0]]
    return kind if isinstance(kind, list) else rest[0]["options"]


def test_links_that_the_owner_has_made_are_names_like_others(server):
    """They are followed, as everywhere in ComfyUI; around in a circle no further than two folders deep."""
    assert offered(server, "Blip3oCheckpointLoader") == ["linked", "loop/linked", "nano", "owner/model"]
    assert server.run(as_constant("Blip3oCheckpointLoader", "linked")).status == "success"
    assert server.run(as_constant("Blip3oCheckpointLoader", "owner/model")).status == "success"


def test_a_link_carries_a_name_to_our_own_look_up(server):
    """Else the test above would only show what the host refuses."""
    try:
        result = server.run(by_link("Blip3oCheckpointLoader", "owner/model"))
    except PromptRejected as rejected:
        pytest.skip(f"this host lets no link into a list of choices: {rejected.node_errors}")
    assert result.status == "success"


def test_every_input_that_names_files_is_among_those_tried(server):
    """A node that learns to read or write files has to be added above."""
    for node, described in server.object_info().items():
        if node.startswith("Blip3o"):
            inputs = {**described["input"].get("required", {}), **described["input"].get("optional", {})}
            lists = {name for name, (kind, *_) in inputs.items() if isinstance(kind, list) or kind == "COMBO"}
            files = lists - {"positions", "scheduler", "stage", "mode", "preset", "image_size", "schedule", "solver"}
            assert files == set(PICKS.get(node, ())), node
            assert not [name for name in inputs if any(word in name for word in ("path", "file", "folder", "directory", "prefix"))], node


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_picked_pickle_is_refused_and_not_run(server, kind):
    """As the folder of a vision tower, and as a file in clip_vision."""
    models, ran = server.base_directory / "models", server.base_directory / "ran"
    folder = models / "blip3o" / f"evil {kind}"
    folder.mkdir()
    write_pickle(folder / "pytorch_model.bin", kind, ran)
    write_pickle(models / "clip_vision" / f"evil {kind}.pt", kind, ran)
    for name in (folder.name, f"clip_vision/evil {kind}.pt"):
        assert name in offered(server, "Blip3oVisionEncoderLoader"), "else it would be refused for its name"
        result = server.run(as_constant("Blip3oVisionEncoderLoader", name))
        assert result.status == "error" and "Nothing in it was run" in result.error["exception_message"]
    assert not ran.exists()
    assert server.run(as_constant("Blip3oVisionEncoderLoader", "eva")).status == "success"


def test_metadata_of_a_lora_is_text_in_the_report(server):
    text = "<script>alert(1)</script>\x1b[2J"
    lora = random_lora(Blip3oCheckpoint.open(CHECKPOINT))
    metadata = lora.metadata | {"blip3o.trigger": text, "blip3o.base_model": "../../secret"}
    write_lora(server.base_directory / "models" / "loras" / "told.safetensors", replace(lora, metadata=metadata))
    graph = as_constant("Blip3oLoraLoader", "told.safetensors")
    graph["shown"]["inputs"]["source"] = ["target", 2]
    [report] = server.run(graph).outputs["shown"]["text"]
    assert "trigger word: <script>alert(1)</script>\\x1b[2J" in report.splitlines()
    assert "base model: ../../secret" in report
