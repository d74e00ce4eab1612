"""UI-format workflow files -> API graphs, as the front end converts them when one presses Run.

A file that contradicts itself or the host's node definitions fails an assertion that names the node and what is wrong.
"""

import copy
from itertools import combinations
from typing import Any, NamedTuple

NOTES = {"MarkdownNote", "Note"}
INPUTS_OF_A_SUBGRAPH, OUTPUTS_OF_A_SUBGRAPH = -10, -20  # as nodes at the ends of its links
REROUTE = "Reroute"  # one input, one output; known to the front end only
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = {"seed", "noise_seed"}  # the front end puts control_after_generate below these unless the schema says no
CONTROLS = {"fixed", "increment", "decrement", "randomize"}
TITLE_HEIGHT = 30  # the title bar is drawn above a node's pos

Node = dict[str, Any]
ObjectInfo = dict[str, dict[str, Any]]  # GET /object_info
Graph = dict[str, dict[str, Any]]  # node id -> {"class_type": ..., "inputs": {...}}


class Link(NamedTuple):
    """One entry of `links`; slots count from 0."""

    id: int
    source: int
    source_slot: int
    target: int
    target_slot: int
    type: str


def to_api(workflow: dict[str, Any], object_info: ObjectInfo) -> Graph:
    """Converts a UI-format workflow (version 0.4, nothing muted or bypassed) without `_meta`; checks it on the way."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]), "two nodes have the same id"
    assert workflow["last_node_id"] >= max(nodes), "last_node_id is below a node's id: new nodes would get one in use"
    links = read_links(workflow, nodes)
    graph: Graph = {}
    for node in nodes.values():
        if node["type"] in NOTES | {REROUTE}:
            continue
        assert node["type"] in object_info, f"{name_of(node)}: the host has no such node"
        assert node["mode"] == 0, f"{name_of(node)} is muted or bypassed (mode {node['mode']})"
        check_sockets(node, object_info[node["type"]])
        linked = {entry["name"]: origin(links[entry["link"]], nodes, links)
                  for entry in node["inputs"] if entry["link"] is not None}  # fmt: skip
        graph[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": widget_values(node, object_info[node["type"]]) | linked,  # a link beats the widget that it covers
        }
    return graph


def blueprint_to_api(blueprint: dict[str, Any], object_info: ObjectInfo) -> tuple[Graph, list[list[str]]]:
    """What the box of a subgraph blueprint runs with the values that it ships, and the inputs [node id, name] that wait for a link."""
    [box], [inner] = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert box["type"] == inner["id"], "the box is of another subgraph"
    assert [entry["name"] for entry in box["inputs"]] == [entry["name"] for entry in inner["inputs"]]
    inside = [link for link in inner["links"] if link["origin_id"] != INPUTS_OF_A_SUBGRAPH and link["target_id"] != OUTPUTS_OF_A_SUBGRAPH]
    nodes, offered = copy.deepcopy(inner["nodes"]), {}
    for node in nodes:
        for slot, entry in enumerate(node["inputs"]):
            for link in inner["links"]:
                if link["id"] == entry["link"] and link["origin_id"] == INPUTS_OF_A_SUBGRAPH:
                    assert (link["target_id"], link["target_slot"]) == (node["id"], slot), f"{name_of(node)}: {entry['name']} dangles"
                    offered[str(node["id"]), entry["name"]] = inner["inputs"][link["origin_slot"]]["name"]
                    entry["link"] = None
        for entry in node["outputs"]:
            entry["links"] = [link["id"] for link in inside if link["id"] in (entry["links"] or [])]
    flat = {
        "nodes": nodes,
        "last_node_id": inner["state"]["lastNodeId"],
        "last_link_id": inner["state"]["lastLinkId"],
        "links": [[link[key] for key in ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")] for link in inside],
    }
    graph = to_api(flat, object_info)
    shown = box["properties"]["proxyWidgets"]
    assert len(shown) == len(box["widgets_values"])
    values = {name: value for (node_id, name), value in zip(shown, box["widgets_values"], strict=True) if node_id == "-1"}
    for node_id, _name in shown:
        assert node_id == "-1" or node_id in graph, f"the box shows a widget of node {node_id}, which is not there"
    sockets = []
    for (node_id, name), offered_as in offered.items():
        if offered_as in values:
            graph[node_id]["inputs"][name] = values[offered_as]
        else:
            sockets.append([node_id, name])
    return graph, sockets


def read_links(workflow: dict[str, Any], nodes: dict[int, Node]) -> dict[int, Link]:
    """Link id -> link, each one known to the sockets on both of its ends, and no socket knowing another."""
    links = {entry[0]: Link(*entry) for entry in workflow["links"]}
    assert len(links) == len(workflow["links"]), "two links have the same id"
    assert workflow["last_link_id"] >= max(links, default=0), "last_link_id is below a link's id"
    for link in links.values():
        assert link.source in nodes, f"{link} dangles: it starts at a node that is not there"
        assert link.target in nodes, f"{link} dangles: it ends at a node that is not there"
        source, target = nodes[link.source], nodes[link.target]
        assert link.source_slot < len(source["outputs"]), f"{link} dangles: {name_of(source)} has no such output"
        assert link.target_slot < len(target["inputs"]), f"{link} dangles: {name_of(target)} has no such input"
        output, entry = source["outputs"][link.source_slot], target["inputs"][link.target_slot]
        assert link.id in (output["links"] or []), f"{link} is not listed at {output['name']} of {name_of(source)}"
        assert entry["link"] == link.id, f"{link}: input {entry['name']} of {name_of(target)} has link {entry['link']}"
        assert fits(output["type"], entry["type"]) and fits(link.type, entry["type"]), (
            f"{link} joins {output['type']} (of {name_of(source)}) and {entry['type']} (of {name_of(target)})"
        )
    for node in nodes.values():
        for slot, entry in enumerate(node["inputs"]):
            known = entry["link"] is None or links.get(entry["link"], ())[3:5] == (node["id"], slot)
            assert known, f"{name_of(node)}: input {entry['name']} dangles, link {entry['link']} doesn't lead there"
        for slot, entry in enumerate(node["outputs"]):
            for link_id in entry["links"] or []:
                known = links.get(link_id, ())[1:3] == (node["id"], slot)
                assert known, f"{name_of(node)}: output {entry['name']} dangles, link {link_id} doesn't start there"
    return links


def check_sockets(node: Node, info: dict[str, Any]) -> None:
    """Sockets in the file are those of the host, which may have more outputs: SaveImage has got one after 0.16."""
    specs = input_specs(info)
    expected = [(name, socket_type(spec)) for name, spec in specs.items() if not is_widget(spec)]
    expected += [(name, socket_type(spec)) for name, spec in specs.items() if is_widget(spec)]  # in the end
    found = [(entry["name"], entry["type"]) for entry in node["inputs"]]
    assert found == expected, f"{name_of(node)} has the inputs {found}, the host {expected}"
    for entry in node["inputs"]:
        widget = {"name": entry["name"]} if is_widget(specs[entry["name"]]) else None
        assert entry.get("widget") == widget, f"{name_of(node)}: {entry['name']} has the widget {entry.get('widget')}"
    outputs = list(zip(info["output_name"], map(type_name, info["output"]), strict=True))
    found = [(entry["name"], entry["type"]) for entry in node["outputs"]]
    assert found == outputs[: len(found)], f"{name_of(node)} has the outputs {found}, the host {outputs}"


def widget_values(node: Node, info: dict[str, Any]) -> dict[str, Any]:
    """widgets_values by name, without the choice of what happens to a seed after each run."""
    names: list[str | None] = []
    for name, spec in input_specs(info).items():
        if is_widget(spec):
            names.append(name)
            if has_seed_control(name, spec):
                names.append(None)
    values = node.get("widgets_values", [])
    assert len(values) == len(names), f"{name_of(node)} has {len(values)} widgets_values, not {len(names)}: {names}"
    pairs = list(zip(names, values, strict=True))
    assert all(value in CONTROLS for name, value in pairs if name is None), (
        f"{name_of(node)}: a seed is not followed by one of {sorted(CONTROLS)} in {values}"
    )
    return {name: value for name, value in pairs if name is not None}


def origin(link: Link, nodes: dict[int, Node], links: dict[int, Link]) -> list[Any]:
    """[node id, output slot] at the start of a link, seen through reroutes."""
    while nodes[link.source]["type"] == REROUTE:
        before = nodes[link.source]["inputs"][0]["link"]
        assert before is not None, f"{link} dangles: it starts at {name_of(nodes[link.source])}, which has no input"
        link = links[before]
    return [str(link.source), link.source_slot]


def check_layout(workflow: dict[str, Any]) -> None:
    """No node covers another, title bars included, and none lies across the edge of a group."""
    boxes = {name_of(node): box(node) for node in workflow["nodes"]}
    for (first, a), (second, b) in combinations(boxes.items(), 2):
        assert not overlap(a, b), f"{first} overlaps {second}"
    for group in workflow["groups"]:
        left, top, width, height = group["bounding"]
        for name, (x0, y0, x1, y1) in boxes.items():
            inside = left <= x0 and top <= y0 and x1 <= left + width and y1 <= top + height
            outside = not overlap((left, top, left + width, top + height), (x0, y0, x1, y1))
            assert inside or outside, f"{name} lies across the edge of group {group['title']!r}"


def box(node: Node) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) with the title bar."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def input_specs(info: dict[str, Any]) -> dict[str, list[Any]]:
    """Name -> [type, options], required ones first, in the order in which the front end shows them."""
    order = info["input_order"]
    return {name: info["input"][kind][name] for kind in ("required", "optional") for name in order.get(kind, [])}


def is_widget(spec: list[Any]) -> bool:
    return socket_type(spec) in WIDGET_TYPES and not options(spec).get("forceInput")


def has_seed_control(name: str, spec: list[Any]) -> bool:
    return socket_type(spec) == "INT" and bool(options(spec).get("control_after_generate", name in SEEDS))


def socket_type(spec: list[Any]) -> str:
    return type_name(spec[0])


def type_name(type_or_choices: str | list[Any]) -> str:
    """A combo of the older schema is written as the list of its choices."""
    return "COMBO" if isinstance(type_or_choices, list) else type_or_choices


def options(spec: list[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def fits(output: str, entry: str) -> bool:
    """Whether the front end lets the two sockets be joined; `*` fits all, `A,B` is one of two."""
    return "*" in (output, entry) or not set(output.split(",")).isdisjoint(entry.split(","))


def name_of(node: Node) -> str:
    return f"node {node['id']} ({node['type']})"
