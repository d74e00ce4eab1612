"""ComfyUI's front end in a browser tab, used as a person uses it. What it says of itself is read; nothing is clicked by script."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Locator, Page, expect

from ..server.comfy_server import ADDRESS, ComfyServer

SIZE = {"width": 1440, "height": 900}
LOAD_TIMEOUT_S = 60
STEP_TIMEOUT_S = 20
"""For what a click should bring, on a machine that draws pictures at the same time."""
RUN_TIMEOUT_S = 240
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the first visit opens a workflow and the templates by itself
    "Comfy.Locale": "en",
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # else texts are left out of a graph as small as a screenshot's
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
}
LISTEN = """() => {
    window.ends = []
    for (const kind of ["execution_success", "execution_error", "execution_interrupted"])
        window.app.api.addEventListener(kind, () => window.ends.push(kind))
    window.titles = []
    new MutationObserver(() => window.titles.push(document.title)).observe(document.querySelector("title"), {childList: true})
}"""
NODES = """() => {
    const canvas = window.app.canvas, frame = canvas.canvas.getBoundingClientRect()
    const shown = (x, y) => { const [u, v] = canvas.ds.convertOffsetToCanvas([x, y]); return [u + frame.x, v + frame.y] }
    return window.app.graph.nodes.map(node => ({
        id: String(node.id), type: node.type, title: node.title, known: node.type in LiteGraph.registered_node_types,
        wrong: Boolean(node.has_errors), width: node.size[0], top_left: shown(...node.pos),
        bottom_right: shown(node.pos[0] + node.size[0], node.pos[1] + node.size[1]),
    }))
}"""
TITLE_HEIGHT = 30  # LiteGraph.NODE_TITLE_HEIGHT; the bar lies above a node's position
PROGRESS = re.compile(r"\[\d+%\]\[(\d+)%\] (.+)")


@dataclass(frozen=True)
class Node:
    """A node of the open graph; corners are those of its body on the screen, in pixels."""

    id: str
    type: str
    title: str
    known: bool
    wrong: bool
    width: float
    """In pixels at 100 %."""
    top_left: tuple[float, float]
    bottom_right: tuple[float, float]

    @property
    def clip(self) -> dict[str, float]:
        (left, top), (right, bottom) = self.top_left, self.bottom_right
        return {"x": left, "y": top, "width": right - left, "height": bottom - top}


class FrontEnd:
    """One tab.

    Args:
        page: a new page.
        server: the server that it shows.
        screenshots: the folder for `screenshot`.
    """

    def __init__(self, page: Page, server: ComfyServer, screenshots: Path) -> None:
        self.page = page
        self.server = server
        self.screenshots = screenshots
        page.set_default_timeout(STEP_TIMEOUT_S * 1000)

    def open(self, locale: str = "en") -> None:
        """Loads the front end with the settings that the tests start from."""
        self.server.post("/settings", SETTINGS | {"Comfy.Locale": locale})
        self.page.goto(f"http://{ADDRESS}:{self.server.port}/")
        run = re.compile("^(Run|Exécuter)$")
        expect(self.page.get_by_role("button", name=run).first).to_be_visible(timeout=LOAD_TIMEOUT_S * 1000)
        self.page.wait_for_function("() => window.app?.graph && Object.keys(LiteGraph.registered_node_types).length > 100")
        self.page.evaluate(LISTEN)

    def browse_templates(self) -> Locator:
        """Opens the templates of this pack and returns the dialog."""
        self.page.get_by_role("button", name="Templates").first.click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_role("button", name=self.server.folder).click()
        return dialog

    def open_template(self, name: str, *, as_app: bool = False) -> None:
        """Opens a workflow of this pack from the template browser, and shows all of it. An app has no graph to be seen."""
        dialog = self.browse_templates()
        dialog.get_by_test_id(f"template-workflow-{name}").click()
        expect(dialog).to_have_count(0)
        expect(self.page.locator(".workflow-tabs").get_by_text(name, exact=True).filter(visible=True).first).to_be_visible()
        self.page.wait_for_function("() => window.app.graph.nodes.length > 0")
        if not as_app:
            self.fit()

    def fit(self) -> None:
        """Brings the whole graph into view."""
        self.page.get_by_role("button", name="Fit View").click()
        self.page.wait_for_timeout(400)  # it glides there

    def nodes(self) -> list[Node]:
        """Of the graph that is open, without the insides of subgraphs."""
        return [Node(**{name: tuple(value) if isinstance(value, list) else value for name, value in node.items()})
                for node in self.page.evaluate(NODES)]  # fmt: skip

    def node(self, type: str, title: str | None = None) -> Node:
        """The first node of the type (and title)."""
        return next(node for node in self.nodes() if node.type == type and title in (None, node.title))

    def select(self, node: Node) -> None:
        """Clicks on its title."""
        (left, top), (right, _) = node.top_left, node.bottom_right
        self.page.mouse.click((left + right) / 2, top - TITLE_HEIGHT / 2 * self.scale())

    def scale(self) -> float:
        """Pixels of the screen for each pixel of the graph."""
        return self.page.evaluate("() => window.app.canvas.ds.scale")

    def help(self) -> Locator:
        """Opens the help pane of the selected node."""
        self.page.get_by_test_id("info-button").click()
        return self.page.locator(".node-help-content")

    def complaints(self) -> list[str]:
        """What is in the way or marked as wrong: dialogs, error messages, nodes that are not installed or are framed in red."""
        self.page.wait_for_timeout(1000)  # it looks for missing models and media after the graph is there
        loud = [self.page.get_by_role("dialog"), self.page.get_by_role("alert"), self.page.get_by_test_id("error-overlay")]
        said = [text for place in loud for text in place.all_inner_texts()]
        unknown = [f"{node.type} is not installed" for node in self.nodes() if not node.known]
        return said + unknown + [f"{node.title} is marked as wrong" for node in self.nodes() if node.wrong]

    def run(self) -> None:
        """Presses Run."""
        self.page.evaluate("() => { window.ends.length = window.titles.length = 0 }")
        self.page.get_by_role("button", name="Run", exact=True).first.click()

    def wait_for_end(self) -> str:
        """Waits for the end of a run and says which: execution_success, execution_error or execution_interrupted."""
        self.page.wait_for_function("() => window.ends.length > 0", timeout=RUN_TIMEOUT_S * 1000)
        return self.page.evaluate("() => window.ends[0]")

    def wait_for_picture(self, node: Node) -> None:
        """Until the node has drawn the picture that it was given."""
        self.page.wait_for_function(
            "id => { const shown = window.app.graph.getNodeById(id)?.imgs ?? []; return shown.length && shown.every(one => one.complete) }",
            arg=node.id)  # fmt: skip
        self.page.wait_for_timeout(500)

    def reads(self, text: str) -> bool:
        """Whether a text box that can be seen holds the text."""
        return any(box.input_value().strip() == text.strip() for box in self.page.locator("textarea").all() if box.is_visible())

    def interrupt(self) -> None:
        self.page.get_by_role("button", name="Cancel current run").click()

    def wait_for_progress(self, at_least: int = 1) -> None:
        """Until a node is so many per cent done, as the title of the tab shows it."""
        self.page.wait_for_function(
            "least => window.titles.some(title => Number(/\\]\\[(\\d+)%\\]/.exec(title)?.[1] ?? 0) >= least)", arg=at_least,
            timeout=RUN_TIMEOUT_S * 1000)  # fmt: skip

    def progress(self) -> dict[str, list[int]]:
        """Node -> the per cents that the title of the tab showed since Run was pressed, each once."""
        seen: dict[str, list[int]] = {}
        for title in self.page.evaluate("() => window.titles"):
            if shown := PROGRESS.fullmatch(title):
                per_cent, node = int(shown[1]), shown[2]
                if seen.setdefault(node, [])[-1:] != [per_cent]:
                    seen[node].append(per_cent)
        return seen

    def open_settings(self) -> Locator:
        self.page.keyboard.press("Control+,")
        return self.page.get_by_role("dialog")

    def languages(self, settings: Locator) -> Locator:
        """Opens the list of languages in the settings and returns its entries."""
        chosen = settings.locator(r"#Comfy\.Locale").get_by_role("combobox")
        chosen.click()
        return self.page.locator(f"#{chosen.get_attribute('aria-controls')}".replace(".", r"\.")).get_by_role("option")

    def close_dialog(self) -> None:
        dialog = self.page.get_by_role("dialog")
        crosses = dialog.locator("button").filter(has=self.page.locator("[class*=times], [class*='--x']"))
        crosses.or_(dialog.get_by_role("button", name=re.compile("^(Close|Fermer)$"))).first.click()
        expect(self.page.get_by_role("dialog")).to_have_count(0)

    def search_library(self, text: str) -> Locator:
        """Searches the node library, which is opened if it isn't, and returns what it found."""
        library = self.page.locator(".sidebar-content-container")
        if not library.is_visible():
            self.page.locator(".node-library-tab-button").click()
        library.locator("input").first.fill(text)
        return library.get_by_role("treeitem")

    def add_blueprint(self, name: str) -> None:
        """Finds a blueprint in the node library, picks it up and puts it down on the canvas."""
        found = self.search_library(name)
        self.page.wait_for_timeout(1000)  # until then it shows what it showed before
        texts = [text.strip() for text in found.all_inner_texts()]
        heading = next(index for index, text in enumerate(texts) if "Blueprints" in text)
        found.nth(texts.index(name, heading)).get_by_text(name, exact=True).click()  # a node may be called the same
        self.page.wait_for_timeout(500)
        self.page.mouse.click(SIZE["width"] * 0.6, SIZE["height"] / 2)
        self.page.wait_for_function("() => window.app.graph.nodes.length > 0")

    def widgets(self, node: Node) -> list[str]:
        """Labels of the settings that the node shows."""
        return self.page.evaluate("id => window.app.graph.getNodeById(id).widgets.map(one => one.label ?? one.name)", node.id)

    def screenshot(self, name: str, **options: Any) -> Path:
        """Puts a JPEG of the tab into the folder of screenshots."""
        file = self.screenshots / f"{name}.jpg"
        self.page.screenshot(path=file, type="jpeg", quality=85, **options)
        return file
