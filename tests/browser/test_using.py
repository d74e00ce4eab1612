"""What a person does beside running a workflow: reads the help, changes the language, stops a run, picks a model that is gone."""

import json
import re
import shutil

import pytest
from playwright.sync_api import expect

from ..server.comfy_server import ComfyServer
from ..server.hosts import REPOSITORY
from .front_end import FrontEnd

ENCODER = "Blip3oTextEncode"
ADD_AND_READ_LABELS = """type => {
    const node = LiteGraph.createNode(type)
    window.app.graph.add(node)
    return Object.fromEntries(node.widgets.map(widget => [widget.name, widget.label ?? widget.name]))
}"""


def test_the_help_pane_of_a_node_shows_its_page(front_end: FrontEnd, host):
    front_end.open_template("text_to_image")
    front_end.select(front_end.node(ENCODER))
    pane = front_end.help()
    page = (REPOSITORY / "web" / "docs" / f"{ENCODER}.md").read_text("utf-8")
    sentence = page.split("\n\n")[1].split(". ")[0]
    expect(pane).to_contain_text(sentence)
    expect(pane.locator("table").first).to_contain_text("backbone")
    picture = pane.locator(f'img[src$="{ENCODER}.jpg"]')
    picture.scroll_into_view_if_needed()
    front_end.page.wait_for_function("picture => picture.naturalWidth > 200", arg=picture.element_handle())
    pane.locator("h1").first.scroll_into_view_if_needed()
    front_end.screenshot(f"help-{host.version}")


def test_another_language(front_end: FrontEnd, host):
    settings = front_end.open_settings()
    front_end.languages(settings).get_by_text("Français", exact=True).click()
    front_end.close_dialog()
    expect(front_end.page.get_by_role("button", name="Exécuter", exact=True).first).to_be_visible()
    french = json.loads((REPOSITORY / "locales" / "fr" / "nodeDefs.json").read_text("utf-8"))[ENCODER]
    front_end.page.reload()  # names of nodes are read when the page is loaded
    front_end.open(locale="fr")
    found = front_end.search_library(french["display_name"])
    expect(found.get_by_text(french["display_name"], exact=True).first).to_be_visible()
    labels = front_end.page.evaluate(ADD_AND_READ_LABELS, ENCODER)
    assert labels == {name: french["inputs"][name]["name"] for name in labels} and "prompt" in labels
    front_end.screenshot(f"french-{host.version}")


def test_a_run_is_stopped_and_the_next_one_works(front_end: FrontEnd, server: ComfyServer):
    front_end.open_template("text_to_image")
    server.post("/free", {"unload_models": True, "free_memory": True})  # nothing of an earlier run is used again
    front_end.run()
    front_end.wait_for_progress()
    front_end.interrupt()
    assert front_end.wait_for_end() == "execution_interrupted"
    front_end.run()
    assert front_end.wait_for_end() == "execution_success"


@pytest.fixture
def model_that_goes(server: ComfyServer):
    folder = server.base_directory / "models" / "blip3o" / "going"
    shutil.copytree(REPOSITORY / "tests" / "data" / "sdxl" / "checkpoint", folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_a_model_that_is_gone_is_named_in_a_dialog(front_end: FrontEnd, model_that_goes, host):
    front_end.page.reload()  # the list of models is read when the page is loaded
    front_end.open()
    front_end.open_template("text_to_image")
    loader = front_end.node("Blip3oCheckpointLoader")
    front_end.page.evaluate("([id, name]) => { window.app.graph.getNodeById(id).widgets[0].value = name }", [loader.id, "going"])
    shutil.rmtree(model_that_goes)
    front_end.run()
    shown = front_end.page.get_by_role("dialog").or_(front_end.page.get_by_test_id("error-overlay")).first
    expect(shown).to_contain_text(re.compile("Load BLIP3-o Checkpoint|Blip3oCheckpointLoader"))
    expect(shown).to_contain_text(re.compile("rejected the value for checkpoint|'going' is not in models/blip3o. Put it there"))
    front_end.screenshot(f"missing-model-{host.version}")
