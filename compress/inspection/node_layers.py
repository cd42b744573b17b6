"""Assignment of the nodes of an ONNX graph to layers, for reporting times by layer."""

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
    """Map node names to layers, as `group_layers` names them."""
    modules = node_modules(path)
    layers = layers_of(dict.fromkeys(name for name in modules.values() if name), at_most)
    return {name: layers[module] if module else UNNAMED for name, module in modules.items()}


def node_modules(path: Path, origins: Mapping[str, str] | None = None) -> dict[str, str]:
    """Map node names to the name of a weight of their module, or to "".

    A node belongs to the module of the weights that it reads. With ``origins`` (`origins_in` of the graph from which
    this one was made), the node or value whose name its own contains takes precedence. Any other node belongs to the
    nearest module behind it, for which it prepares the input, or before it in the case of activations and sums.
    """
    graph = read_graph(path)
    meanings = {
        item.name: meaning for item, meaning in zip(graph.initializers, describe_initializers(graph), strict=True)
    }
    # Index consumers and producers of each value.
    users: dict[str, list[GraphNode]] = defaultdict(list)
    for node in graph.nodes:
        for name in node.inputs:
            users[name].append(node)
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    direct = {node.name: module for node in graph.nodes if (module := _own(node, meanings, origins or {}))}

    def behind(node: GraphNode) -> list[GraphNode]:
        return [user for name in node.outputs if name for user in users[name]]

    def before(node: GraphNode) -> list[GraphNode]:
        return [makers[name] for name in node.inputs if name in makers]

    modules = {}
    for node in graph.nodes:
        # Activations belong to the module before them, everything else to the one behind.
        first, then = (before, behind) if node.op_type in _BELONG_TO_WHAT_CAME_BEFORE else (behind, before)
        modules[node.name] = direct.get(node.name) or _nearest(node, first, direct) or _nearest(node, then, direct)
    return modules


def origins_in(path: Path) -> dict[str, str]:
    """Map the names of nodes, values and weights of a graph to modules, to recognise them in a derived graph."""
    graph = read_graph(path)
    modules = node_modules(path)
    origins: dict[str, str] = {}
    for node in graph.nodes:
        module = modules.get(node.name, "")
        if module:
            origins |= dict.fromkeys((node.name, *node.outputs), module)
    # Weights keep their own names as origins.
    for item, meaning in zip(graph.initializers, describe_initializers(graph), strict=True):
        if meaning.role == "weight" and "." in meaning.name:
            origins[item.name] = meaning.name
    return {name: module for name, module in origins.items() if name}


def _own(node: GraphNode, meanings: Mapping[str, InitializerRole], origins: Mapping[str, str]) -> str:
    """Return the module implied by the node's names or weights; constants of quantizers have unknown modules."""
    module = _module(node, meanings)
    return _origin(node, origins) or (module if not origins or module in origins.values() else "")


def _origin(node: GraphNode, origins: Mapping[str, str]) -> str:
    """Return the module of the longest known name that a name of the node contains as whole words."""
    if not origins:
        return ""
    # Optimizers append suffixes to names of nodes and outputs.
    for name in (node.name, *node.outputs):
        matches = [part for part in _parts(name.rpartition("#")[0] or name) if part in origins]
        if matches:
            return origins[max(matches, key=len)]
    return ""


def _parts(name: str) -> Iterator[str]:
    """Return every substring of ``name`` between two separators."""
    cuts = [match.span() for match in _SEPARATOR.finditer(name)]
    starts = [0, *(end for _, end in cuts)]
    ends = [*(start for start, _ in cuts), len(name)]
    return (name[start:end] for start in starts for end in ends if end > start)


def _module(node: GraphNode, meanings: Mapping[str, InitializerRole]) -> str:
    """Return the name of the first weight that belongs to a module."""
    names = [meanings[name] for name in node.inputs if name in meanings]
    weights = [role.name for role in names if role.role == "weight" and "." in role.name]
    return next((name for name in weights if not name.startswith("unnamed.")), "")


def _nearest(node: GraphNode, step: Callable[[GraphNode], Sequence[GraphNode]], own: dict[str, str]) -> str:
    """Return the module of the nearest node in one direction that has one, breadth first."""
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
