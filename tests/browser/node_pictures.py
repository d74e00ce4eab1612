"""Pictures of the nodes for their help pages, each taken from a shipped workflow: `python -m tests.browser.node_pictures [NODE ...]`."""

import sys
import tempfile
from pathlib import Path

from ..nodes.help_graphs import workflow_of
from ..nodes.schemas import REPOSITORY, read_schemas
from ..server.comfy_server import ComfyServer
from ..server.hosts import prepare_host, selected_hosts
from . import chromium
from .conftest import furnish
from .front_end import SIZE, TITLE_HEIGHT, FrontEnd

MARGIN = 24
CENTRE = """id => {
    const canvas = window.app.canvas
    canvas.ds.scale = 1
    canvas.centerOnNode(window.app.graph.getNodeById(id))
    canvas.setDirty(true, true)
}"""


def take(front_end: FrontEnd, node_id: str, file: Path) -> None:
    """Opens the workflow that the page shows and puts the node's picture into the file."""
    front_end.open_template(workflow_of(node_id))
    node = front_end.node(node_id)
    front_end.page.wait_for_timeout(800)  # it glides to the view of the whole graph
    front_end.page.evaluate(CENTRE, node.id)
    front_end.page.wait_for_timeout(800)
    clip = next(one for one in front_end.nodes() if one.id == node.id).clip
    front_end.page.screenshot(path=file, type="jpeg", quality=85, clip={
        "x": clip["x"] - MARGIN, "y": clip["y"] - TITLE_HEIGHT - MARGIN, "width": clip["width"] + 2 * MARGIN,
        "height": clip["height"] + TITLE_HEIGHT + 2 * MARGIN})  # fmt: skip


def main() -> None:
    host = prepare_host(selected_hosts()[-1])
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        furnish(base, host)
        with ComfyServer(host, base) as server, chromium.launch(chromium.find()) as browser:
            for schema in read_schemas():
                if sys.argv[1:] and schema.node_id not in sys.argv[1:]:
                    continue
                tab = FrontEnd(browser.new_context(viewport=SIZE).new_page(), server, base)
                tab.open()
                take(tab, schema.node_id, REPOSITORY / "web" / "docs" / f"{schema.node_id}.jpg")
                tab.page.context.close()


if __name__ == "__main__":
    main()
