"""The boxes of this pack in the node library: found, put on the canvas, connected and run."""

import pytest

from ..server.comfy_server import ComfyServer, Result
from ..server.hosts import Host
from .front_end import FrontEnd

CONNECT = """([source, sink]) => {
    const graph = window.app.graph, [box] = graph.nodes
    const add = (type, x) => {
        const node = LiteGraph.createNode(type)
        node.pos = [box.pos[0] + x, box.pos[1]]
        return graph.add(node), node
    }
    if (source) add(source, -500).connect(0, box, "images")
    box.connect(0, add(sink, 500), 0)
}"""
SEED = "seed"


@pytest.mark.parametrize(
    ("name", "source", "sink"),
    [
        ("BLIP3-o Text to Image", None, "PreviewImage"),
        ("BLIP3-o Edit", "LoadImage", "PreviewImage"),
        ("BLIP3-o Ask", "LoadImage", "PreviewAny"),
    ],
    ids=["draw", "edit", "ask"],
)
def test_a_blueprint_is_found_and_runs(front_end: FrontEnd, server: ComfyServer, host: Host, name: str, source: str | None, sink: str):
    front_end.page.evaluate("() => window.app.graph.clear()")
    front_end.add_blueprint(name)
    [box] = front_end.nodes()
    assert (box.title, box.known, box.wrong) == (name, True, False)
    assert SEED in front_end.widgets(box)
    front_end.page.evaluate(CONNECT, [source, sink])
    front_end.fit()
    assert front_end.complaints() == []
    front_end.run()
    assert front_end.wait_for_end() == "execution_success"
    [(job, entry)] = server.get("/history?max_items=1").items()
    result = Result(job, outputs=entry["outputs"])
    assert server.images(result) if sink == "PreviewImage" else any("".join(output.get("text", [])) for output in result.outputs.values())
    front_end.screenshot(f"blueprint-{name.replace(' ', '-')}-{host.version}")
