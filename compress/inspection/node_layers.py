"""Which layer each node of an ONNX graph belongs to, so that its time can be told by layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from compress.formats.onnx.graph_reader import GraphNode, read_graph
from compress.formats.onnx.stored_tensors import InitializerRole, describe_initializers
from compress.inspection.layers import layers_of

UNNAMED = "(no layer)"
_SEPARATOR = re.compile(r"[_/.:]")
_BELONG_TO_WHAT_CAME_BEFORE = frozenset({"Add", "Sum", "Tanh", "Relu", "Gelu", "FastGelu", "QuickGelu", "Mul", "Clip"})


def node_layers(path: Path, at_most: int = 40) -> dict[str, str]:
    """Node's name -> its layer, as `group_layers` names it."""
    found = node_modules(path)
    layers = layers_of(dict.fromkeys(name for name in found.values() if name), at_most)
    return {name: layers[module] if module else UNNAMED for name, module in found.items()}


def node_modules(path: Path, origins: Mapping[str, str] | None = None) -> dict[str, str]:
    """Node's name -> the name of a weight of the module that it belongs to, or "".

    A node belongs to the module of the weights that it reads; where ``origins`` are given (`origins_in` of the graph
    that this one was made from), rather to that of the node or value that its name was made from. Any other belongs
    to the nearest module behind it, which it prepares the input of, or, for activations and sums, before it.
    """
    graph = read_graph(path)
    meanings = {item.name: meaning for item, meaning in zip(graph.initializers, describe_initializers(graph), strict=True)}
    users: dict[str, list[GraphNode]] = defaultdict(list)
    for node in graph.nodes:
        for name in node.inputs:
            users[name].append(node)
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    own = {node.name: module for node in graph.nodes if (module := _own(node, meanings, origins or {}))}

    def behind(node: GraphNode) -> list[GraphNode]:
        return [user for name in node.outputs if name for user in users[name]]

    def before(node: GraphNode) -> list[GraphNode]:
        return [makers[name] for name in node.inputs if name in makers]

    found = {}
    for node in graph.nodes:
        first, then = (before, behind) if node.op_type in _BELONG_TO_WHAT_CAME_BEFORE else (behind, before)
        found[node.name] = own.get(node.name) or _nearest(node, first, own) or _nearest(node, then, own)
    return found


def origins_in(path: Path) -> dict[str, str]:
    """Name of each node, value and weight of a graph -> its module, to know them by in a graph made from this one."""
    graph = read_graph(path)
    modules = node_modules(path)
    found: dict[str, str] = {}
    for node in graph.nodes:
        module = modules.get(node.name, "")
        if module:
            found |= dict.fromkeys((node.name, *node.outputs), module)
    for item, meaning in zip(graph.initializers, describe_initializers(graph), strict=True):
        if meaning.role == "weight" and "." in meaning.name:
            found[item.name] = meaning.name
    return {name: module for name, module in found.items() if name}


def _own(node: GraphNode, meanings: Mapping[str, InitializerRole], origins: Mapping[str, str]) -> str:
    """What the node's names or weights tell; quantizers' own constants have modules that no origin knows."""
    module = _module(node, meanings)
    return _origin(node, origins) or (module if not origins or module in origins.values() else "")


def _origin(node: GraphNode, origins: Mapping[str, str]) -> str:
    """The module of the longest known name that a name of the node contains as whole words."""
    if not origins:
        return ""
    for name in (node.name, *node.outputs):
        found = [part for part in _parts(name.rpartition("#")[0] or name) if part in origins]
        if found:
            return origins[max(found, key=len)]
    return ""


def _parts(name: str) -> Iterator[str]:
    """Every stretch of ``name`` between two of its separators."""
    cuts = [match.span() for match in _SEPARATOR.finditer(name)]
    starts = [0, *(end for _, end in cuts)]
    ends = [*(start for start, _ in cuts), len(name)]
    return (name[start:end] for start in starts for end in ends if end > start)


def _module(node: GraphNode, meanings: Mapping[str, InitializerRole]) -> str:
    """The name of the first weight that is known to belong to a module."""
    names = [meanings[name] for name in node.inputs if name in meanings]
    known = [each.name for each in names if each.role == "weight" and "." in each.name]
    return next((name for name in known if not name.startswith("unnamed.")), "")


def _nearest(node: GraphNode, step: Callable[[GraphNode], Sequence[GraphNode]], own: dict[str, str]) -> str:
    """The module of the nearest node in one direction that has one, breadth first."""
    front, seen = [node], {node.name}
    while front:
        following = []
        for current in front:
            for other in step(current):
                if other.name in own:
                    return own[other.name]
                if other.name not in seen:
                    seen.add(other.name)
                    following.append(other)
        front = following
    return ""
