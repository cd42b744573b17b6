"""Which layer each node of an ONNX graph belongs to, so that its time can be told by layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from compress.inspect.layers import layers_of
from compress.inspect.onnx_graph import Node, read_graph
from compress.inspect.onnx_names import Meaning, explain

UNNAMED = "(no layer)"
_BELONG_TO_WHAT_CAME_BEFORE = frozenset({"Add", "Sum", "Tanh", "Relu", "Gelu", "FastGelu", "QuickGelu", "Mul", "Clip"})


def node_layers(path: Path, at_most: int = 40) -> dict[str, str]:
    """Node's name -> its layer, as `group_layers` names it.

    A node belongs to the module of the weights that it reads. One without weights belongs to the nearest module
    behind it, which it prepares the input of, or, for activations and sums, before it.
    """
    graph = read_graph(path)
    meanings = {item.name: meaning for item, meaning in zip(graph.initializers, explain(graph), strict=True)}
    users: dict[str, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        for name in node.inputs:
            users[name].append(node)
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    own = {node.name: module for node in graph.nodes if (module := _module(node, meanings))}

    def behind(node: Node) -> list[Node]:
        return [user for name in node.outputs if name for user in users[name]]

    def before(node: Node) -> list[Node]:
        return [makers[name] for name in node.inputs if name in makers]

    found = {}
    for node in graph.nodes:
        first, then = (before, behind) if node.op_type in _BELONG_TO_WHAT_CAME_BEFORE else (behind, before)
        found[node.name] = own.get(node.name) or _nearest(node, first, own) or _nearest(node, then, own)
    layers = layers_of(dict.fromkeys(name for name in found.values() if name), at_most)
    return {name: layers[module] if module else UNNAMED for name, module in found.items()}


def _module(node: Node, meanings: dict[str, Meaning]) -> str:
    """The name of the first weight that is known to belong to a module."""
    names = [meanings[name] for name in node.inputs if name in meanings]
    known = [each.name for each in names if each.role == "weight" and "." in each.name]
    return next((name for name in known if not name.startswith("unnamed.")), "")


def _nearest(node: Node, step: Callable[[Node], Sequence[Node]], own: dict[str, str]) -> str:
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
