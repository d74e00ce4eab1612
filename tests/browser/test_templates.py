"""Every workflow of this pack, opened from the template browser and run as it is."""

import json

import pytest
from playwright.sync_api import expect

from ..server.comfy_server import ComfyServer, Result
from ..server.hosts import REPOSITORY, Host, selected_hosts
from .front_end import FrontEnd
from .pictures import likeness

WORKFLOWS = sorted(file.stem for file in (REPOSITORY / "workflows").glob("*.json"))
NEEDS_A_DOWNLOAD = {"reconstruction_sana"}
RUNS_ON_ALL_HOSTS = {"text_to_image"}
"""The newest host runs all; tests/server runs all on the others too."""


APP = "draw_and_ask"
APP_INPUTS = ("prompt", "seed", "pictures", "guidance", "image", "question")
"""What the form asks for: what the demo of the reference does."""
APP_PROMPT = "a green ring on a white background"


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_template_opens_whole_and_runs(front_end: FrontEnd, server: ComfyServer, host: Host, name: str):
    if name == APP:
        return use_the_app(front_end, server, host)
    front_end.open_template(name)
    assert front_end.complaints() == []
    shipped = json.loads((REPOSITORY / "workflows" / f"{name}.json").read_text("utf-8"))
    assert {node.id: node.type for node in front_end.nodes()} == {str(node["id"]): node["type"] for node in shipped["nodes"]}
    if name not in NEEDS_A_DOWNLOAD and (host.version == newest(host) or name in RUNS_ON_ALL_HOSTS):
        run(front_end, server)
    front_end.screenshot(f"template-{name}-{host.version}")


def use_the_app(front_end: FrontEnd, server: ComfyServer, host: Host) -> None:
    """A form in place of the graph: it draws the prompt, and answers the question. Older front ends choose what it asks for themselves."""
    front_end.open_template(APP, as_app=True)
    page = front_end.page
    if host.version == newest(host):
        for label in APP_INPUTS:
            expect(page.get_by_text(label, exact=True).filter(visible=True).first).to_be_visible()
        page.locator("textarea").filter(visible=True).first.fill(APP_PROMPT)
    front_end.run()
    assert front_end.wait_for_end() == "execution_success"
    [(job, entry)] = server.get("/history?max_items=1").items()
    result = Result(job, outputs=entry["outputs"])
    assert any("".join(output.get("text", [])) for output in result.outputs.values())
    assert host.version != newest(host) or APP_PROMPT in str(entry["prompt"])
    [saved] = [image for output in result.outputs.values() for image in output.get("images", [])]
    expect(page.locator(f'img[src*="{saved["filename"]}"]').filter(visible=True).first).to_be_visible()
    front_end.screenshot(f"app-{host.version}")


def newest(host: Host) -> str:
    return selected_hosts()[-1].comfyui_version or host.version


def run(front_end: FrontEnd, server: ComfyServer) -> None:
    """The progress moves, the pictures appear in their nodes, and the answers in text boxes."""
    before = {node: front_end.page.screenshot(clip=node.clip) for node in front_end.nodes() if node.type == "SaveImage"}
    front_end.run()
    assert front_end.wait_for_end() == "execution_success"
    assert max(map(len, front_end.progress().values())) >= 3, front_end.progress()
    [(job, entry)] = server.get("/history?max_items=1").items()
    result = Result(job, outputs=entry["outputs"])
    assert before or any("text" in output for output in result.outputs.values())
    for node, empty in before.items():
        front_end.wait_for_picture(node)
        picture, *_ = server.images(result, node.id)
        scale = min(1, node.width / picture.width) * front_end.scale()
        there, earlier = (likeness(screen, picture, scale) for screen in (front_end.page.screenshot(clip=node.clip), empty))
        print(f"{node.title}: {there:.2f}, before {earlier:.2f}")
        assert there >= 0.8 > earlier
    for text in (text for output in result.outputs.values() for text in output.get("text", [])):
        assert front_end.reads(text), text
