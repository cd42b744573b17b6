"""Grouping of tensor names into readable layers such as `encoder.layer.0.attention`."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from compress.formats.onnx.graph_reader import GraphNode, read_graph
from compress.formats.onnx.stored_tensors import COMPANION_NAME, InitializerRole, describe_initializers
from compress.models.stored_tensor import StoredTensor

_BLOCK = re.compile(r"^(?P<stack>(?:[^.\d][^.]*\.)+)(?P<number>\d+)\.(?P<rest>.+)$")
_NORM = re.compile(r"norm|^ln_?\d|(\.|^)ln", re.IGNORECASE)
_PARTS = (
    ("cross-attention", re.compile(r"cross_?att|encoder_attn|EncDecAttention", re.IGNORECASE)),
    ("attention", re.compile(r"attn|attention", re.IGNORECASE)),
    (
        "feed-forward",
        re.compile(
            r"^(intermediate|output|fc_?\d|lin\d|wi|wo)\b|mlp|ffn|feed_?forward|DenseReluDense|expert|moe",
            re.IGNORECASE,
        ),
    ),
    ("norms", _NORM),
)
_PART_ORDER = {"attention": 0, "cross-attention": 1, "feed-forward": 2, "norms": 3}

Groups = dict[str, list[StoredTensor]]


def group_layers(tensors: Sequence[StoredTensor], at_most: int = 40) -> Groups:
    """Group tensors by layer in reading order, with coarser groups until there are at most ``at_most``."""
    layers = layers_of([tensor.name for tensor in tensors], at_most)
    groups: Groups = defaultdict(list)
    for tensor in tensors:
        groups[layers[tensor.name]].append(tensor)
    if len(groups) > at_most:
        # Small groups are joined into "other".
        ranked = sorted(groups, key=lambda name: -sum(tensor.bytes for tensor in groups[name]))
        other = [tensor for name in ranked[at_most - 1 :] for tensor in groups[name]]
        groups = {**{name: groups[name] for name in ranked[: at_most - 1]}, "other": other}
    return {name: groups[name] for name in sorted(groups, key=reading_order)}


def layers_of(names: Iterable[str], at_most: int = 40) -> dict[str, str]:
    """Map tensor names to layers, by the finest naming with at most ``at_most`` layers, else the coarsest."""
    names = list(names)
    prefix = model_prefix(names)
    # Try the finest naming first.
    for form in ("{stack}{number}.{part}", "{stack}{number}", "{stack}*.{part}"):
        layers = {name: _layer(name.removeprefix(prefix), form) for name in names}
        if len(set(layers.values())) <= at_most:
            break
    return layers


def model_prefix(names: Iterable[str]) -> str:
    """Return the wrapper of the model, such as `bert.` around `embeddings` and `encoder`; empty if there is none."""
    names = [name for name in names if "." in name]
    blocks = [name for name in names if _BLOCK.match(name)]
    # A wrapper exists if all blocks are below one module.
    firsts = Counter(name.split(".")[0] for name in blocks)
    if len(firsts) != 1:
        return ""
    first = next(iter(firsts))
    inside = {name.split(".")[1] for name in names if name.startswith(f"{first}.")}
    outside = {name.split(".")[0] for name in names} - {first}
    # Removing the prefix must not make names ambiguous.
    if len(inside) < 2 or inside & outside or any(part.isdigit() for part in inside):
        return ""
    return f"{first}."


def _layer(name: str, form: str) -> str:
    """Return the layer of a tensor. Inside a numbered block its name has the given form."""
    match = _BLOCK.match(name)
    if match:
        first = match["rest"].split(".")[0]
        parts = ((part, pattern.search(match["rest"])) for part, pattern in _PARTS)
        part = "norms" if _NORM.search(first) else next((part for part, is_part in parts if is_part), first)
        return form.format(**match.groupdict(), part=part)
    modules = name.split(".")
    # Names without a module stay as they are.
    if len(modules) == 1 or modules[0] == "constants":
        return modules[0]
    return ".".join(modules[:-1][:2]) if modules[0] != "unnamed" else COMPANION_NAME.sub(r"\g<weight>", name)


def reading_order(name: str) -> tuple[int, str, int, int, str]:
    """Return the sort key of a layer: embeddings, blocks by number and part, heads, everything else."""
    if name in ("constants", "other"):
        return (3, name, 0, 0, name)
    match = re.match(r"^(?P<stack>.*?\.)(?P<number>\d+)(\.(?P<part>.+))?$", name)
    if match:
        return (1, match["stack"], int(match["number"]), _PART_ORDER.get(match["part"] or "", 9), name)
    return (0 if re.search("emb|wte|wpe|shared|stem", name) else 2, "", 0, 0, name)


UNNAMED = "(no layer)"
_BELONG_TO_WHAT_CAME_BEFORE = frozenset({"Add", "Sum", "Tanh", "Relu", "Gelu", "FastGelu", "QuickGelu", "Mul", "Clip"})


def node_layers(path: Path, at_most: int = 40) -> dict[str, str]:
    """Map node names to layers, as `group_layers` names them."""
    modules = node_modules(path)
    layers = layers_of(dict.fromkeys(name for name in modules.values() if name), at_most)
    return {name: layers[module] if module else UNNAMED for name, module in modules.items()}


def node_modules(path: Path) -> dict[str, str]:
    """Map node names to the name of a weight of their module, or to "".

    A node belongs to the module of the weights that it reads. Any other node belongs to the nearest module behind
    it, for which it prepares the input, or before it in the case of activations and sums.
    """
    graph = read_graph(path)
    initializers = (item.name for item in graph.initializers)
    meanings = dict(zip(initializers, describe_initializers(graph), strict=True))
    # Index consumers and producers of each value.
    users: dict[str, list[GraphNode]] = defaultdict(list)
    for node in graph.nodes:
        for name in node.inputs:
            users[name].append(node)
    makers = {name: node for node in graph.nodes for name in node.outputs if name}
    direct = {node.name: module for node in graph.nodes if (module := _own(node, meanings))}

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


def _own(node: GraphNode, meanings: Mapping[str, InitializerRole]) -> str:
    """Return the module of the weights that a node reads; constants of quantizers have unknown modules."""
    # The name of the first weight that belongs to a module.
    roles = [meanings[name] for name in node.inputs if name in meanings]
    weights = [role.name for role in roles if role.role == "weight" and "." in role.name]
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
