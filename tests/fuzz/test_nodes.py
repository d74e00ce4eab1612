"""What a workflow may say to the nodes, on a real server: values of other types, out of range, without end, links to nowhere.

The host documents two ways to say no: it refuses the graph before it runs, or the node raises and the prompt ends with its error.
For our nodes that error is one of the Blip3oError family. The server lives on.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from blip3o_core import errors
from blip3o_core.lora.files import write_lora
from blip3o_core.variants.blip3o import Blip3oCheckpoint

from ..server.comfy_server import ComfyServer, PromptRejected, ServerError
from ..server.hosts import HostSpec, prepare_host, selected_hosts
from ..unit.lora_samples import random_lora
from .conftest import MAX_GROWTH, Campaign
from .damage import ODD_NUMBERS, ODD_TEXTS, odd_values

DATA = Path(__file__).parents[1] / "data"
MODELS = {"blip3o/tiny": DATA / "sdxl" / "checkpoint", "blip3o/eva": DATA / "sdxl" / "eva_clip_vision_tower",
          "blip3o/sana": DATA / "sana" / "checkpoint"}  # fmt: skip
DOCUMENTED = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.Blip3oError)}
PROVIDERS: dict[str, tuple[str, int]] = {
    "BLIP3O_BACKBONE": ("Blip3oCheckpointLoader", 0), "MODEL": ("Blip3oCheckpointLoader", 1), "LATENT": ("Blip3oEmptyEmbedding", 0),
    "BLIP3O_VISION_ENCODER": ("Blip3oVisionEncoderLoader", 0), "BLIP3O_CONVERSATION": ("Blip3oChat", 1), "IMAGE": ("EmptyImage", 0),
}  # fmt: skip
"""Type of a socket -> which output of which node gives it."""
VALUES = {
    "checkpoint": "tiny", "decoder": "tiny", "vision_encoder": "eva", "lora_name": "fits.safetensors", "prompt": "a red circle",
    "question": "What?", "message": "Hello.", "max_new_tokens": 2, "width": 64, "height": 64, "batch_size": 1, "color": 0,
}  # fmt: skip
OWN_VALUES = {("Blip3oSANADecoderLoader", "decoder"): "sana"}
TARGET, SHOWN = "target", "shown"
CASE_TIMEOUT_S = 60

Graph = dict[str, dict[str, Any]]


def host_parameter(spec: HostSpec):
    """The newest host, and the others at night."""
    return pytest.param(spec, marks=[] if spec is selected_hosts()[-1] else [pytest.mark.nightly], id=spec.name)


@pytest.fixture(scope="module", params=map(host_parameter, selected_hosts()))
def server(request, tmp_path_factory) -> Iterator[ComfyServer]:
    """One for the whole file: what one case does to the server shows in the next."""
    base = tmp_path_factory.mktemp("comfyui")
    (base / "models" / "loras").mkdir(parents=True)
    write_lora(base / "models" / "loras" / "fits.safetensors", random_lora(Blip3oCheckpoint.open(MODELS["blip3o/tiny"])))
    with ComfyServer(prepare_host(request.param), base, models=MODELS) as running:
        yield running


@pytest.fixture(scope="module")
def info(server) -> dict[str, dict[str, Any]]:
    return server.object_info()


def inputs_of(info: dict[str, Any], node: str, *, optional: bool = True) -> dict[str, list]:
    """Name -> [type or list of choices, options]."""
    kinds = ("required", "optional") if optional else ("required",)
    return {name: described for kind in kinds for name, described in info[node]["input"].get(kind, {}).items()}


def graph_of(info: dict[str, Any], node: str) -> Graph:
    """The smallest graph that runs this node: with what it needs, and something that shows its first output."""
    graph: Graph = {}
    add(graph, info, node, TARGET)
    if info[node]["output"]:
        graph[SHOWN] = {"class_type": "PreviewAny", "inputs": {"source": [TARGET, 0]}}
    return graph


def add(graph: Graph, info: dict[str, Any], node: str, key: str) -> None:
    inputs = {}
    for name, (kind, *options) in inputs_of(info, node, optional=key == TARGET).items():
        if isinstance(kind, str) and kind in PROVIDERS:
            provider, output = PROVIDERS[kind]
            if provider != node:  # a chat may do without a conversation
                if provider not in graph:
                    add(graph, info, provider, provider)
                inputs[name] = [provider, output]
            continue
        choices = kind if isinstance(kind, list) else options[0].get("options", [""]) if options else [""]
        inputs[name] = OWN_VALUES.get((node, name), VALUES.get(name, options[0].get("default", choices[0]) if options else choices[0]))
    graph[key] = {"class_type": node, "inputs": inputs}


def our_nodes(info: dict[str, Any]) -> list[str]:
    return sorted(node for node in info if node.startswith("Blip3o"))


def run(server: ComfyServer, graph: Graph) -> str:
    """-> accepted or refused. Fails unless the host refuses the graph, or a node does with an error that is documented."""
    try:
        result = server.run(graph, timeout_s=CASE_TIMEOUT_S)
    except PromptRejected as rejected:
        assert rejected.node_errors or rejected.error["type"], rejected
        return "refused"
    if result.status == "success":
        return "accepted"
    assert result.status == "error", result
    kind, message = result.error["exception_type"], result.error["exception_message"]
    assert kind.rpartition(".")[2] in DOCUMENTED, f"{result.error['node_type']}: {kind}: {message}\n{''.join(result.error['traceback'])}"
    assert len(message) < 5000
    return "refused"


def test_every_node_runs_as_it_is_tried(server, info):
    """Else the cases below would be refused for another reason than theirs."""
    assert len(our_nodes(info)) >= 14
    for node in our_nodes(info):
        assert run(server, graph_of(info, node)) == "accepted", node


@pytest.mark.parametrize("constant", [None, "text", 5, {"__value__": {"samples": [1]}}], ids=["nothing", "text", "number", "table"])
def test_a_constant_in_place_of_a_socket_is_named(server, info, constant):
    """The host lets it through. Found by the cases below: every node with a socket failed in its own way."""
    sockets = [(node, name) for node in our_nodes(info) for name, (kind, *_) in inputs_of(info, node, optional=False).items()
               if isinstance(kind, str) and kind in PROVIDERS]  # fmt: skip
    assert len(sockets) >= 10
    for node, name in sockets:
        graph = graph_of(info, node)
        graph[TARGET]["inputs"][name] = constant
        assert run(server, graph) == "refused", (node, name)


LINKS = st.one_of(
    st.builds(lambda *link: list(link), st.sampled_from(["Blip3oCheckpointLoader", "EmptyImage", TARGET, SHOWN, "ghost", "", "1"]),
              st.sampled_from([0, 1, 2, 99])),
    st.sampled_from([[TARGET], [TARGET, 0, 0], ["EmptyImage", "0"], [None, 0], [["EmptyImage", 0], 0], ["EmptyImage", 0.5], [{}, {}]]),
)  # fmt: skip
TEXTS = st.one_of(st.sampled_from(ODD_TEXTS), st.text(max_size=40),
                  st.sampled_from(["a" * 200_000, "<|im_end|>" * 500, "{a|b}" * 100, "{" * 2000]))  # fmt: skip
PLACES = st.lists(st.sampled_from(["..", "/", "\\", "tiny", "eva", "fits", ".safetensors", "\0", "C:", "etc", "passwd", "%2e", "~",
                                   "clip_vision/", " "]), max_size=6).map("".join)  # fmt: skip
KINDS = ("value", "value", "text", "number", "edge", "edge", "link", "place", "wrapped", "nothing")
"""A link to nowhere from an input that the node doesn't have is left out: the host doesn't check it, and stops to run prompts for ever."""
WRAPPED = st.builds(lambda value: {"__value__": value}, odd_values())


def edges(described: list) -> list[Any]:
    """Just in and just out of the range that an input has."""
    options = described[1] if len(described) > 1 else {}
    low, high = options.get("min"), options.get("max")
    bounds = [(bound, step) for bound, step in ((low, -1), (high, 1)) if bound is not None]
    return [value for bound, step in bounds for value in (bound, bound + step, float(bound), str(bound))]


def test_inputs_of_nodes(fuzz, server, info):
    nodes = our_nodes(info)
    graphs = {node: graph_of(info, node) for node in nodes}
    assert run(server, graphs["Blip3oTextEncode"]) == "accepted"
    before = server.rss_bytes()

    def check(data):
        node = data.draw(st.sampled_from(nodes), "node")
        graph = json.loads(json.dumps(graphs[node]))
        known = inputs_of(info, node)
        for _ in range(data.draw(st.integers(1, 2), "changes")):
            name = data.draw(st.sampled_from([*known, "no_such_input"]), "input")
            kind = data.draw(st.sampled_from(KINDS if name in known else [kind for kind in KINDS if kind != "link"]), "kind")
            if kind == "nothing":
                graph[TARGET]["inputs"].pop(name, None)
                continue
            limits = edges(known.get(name, []))
            strategy = {"value": odd_values(), "text": TEXTS, "number": st.sampled_from(ODD_NUMBERS), "link": LINKS, "place": PLACES,
                        "wrapped": WRAPPED, "edge": st.sampled_from(limits or [None])}[kind]  # fmt: skip
            graph[TARGET]["inputs"][name] = data.draw(strategy, "it")
        return run(server, graph)

    fuzz(check, ci=60, nightly=500, data=st.data())
    require_alive(fuzz, server, before)


def test_shapes_of_graphs(fuzz, server, info):
    """The graph itself: ids, classes and inputs that are none, cycles, and nothing at all."""
    graph = graph_of(info, "Blip3oTextEncode")
    before = server.rss_bytes()

    def check(place, value):
        changed = json.loads(json.dumps(graph))
        if place == "graph":
            changed = value
        elif place == "node":
            changed[TARGET] = value
        elif place == "class":
            changed[TARGET]["class_type"] = value
        elif place == "inputs":
            changed[TARGET]["inputs"] = value
        else:
            changed[str(value)] = changed.pop(TARGET)
        try:
            return run(server, changed)
        except ServerError as error:  # the host's own answer to what is no graph, before any node is asked
            if "POST /prompt gave 500" not in str(error):
                raise
            return "refused"

    fuzz(check, ci=12, nightly=100, place=st.sampled_from(["graph", "node", "class", "inputs", "id"]), value=odd_values())
    require_alive(fuzz, server, before)


def require_alive(campaign: Campaign, server: ComfyServer, before: int) -> None:
    """The process that was started still answers, has kept its memory, and draws."""
    status = Path(f"/proc/{server._running().pid}/status").read_text()
    campaign.peak_bytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024 - before
    assert campaign.peak_bytes <= 2 * MAX_GROWTH, f"the server took {campaign.peak_bytes / 2**20:.0f} MiB more than before"
    assert server.rss_bytes() - before <= MAX_GROWTH
    assert server.is_alive()
    assert run(server, graph_of(server.object_info(), "Blip3oTextEncode")) == "accepted"
    assert server.get("/queue") == {"queue_running": [], "queue_pending": []}
