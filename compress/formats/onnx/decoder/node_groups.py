"""Grouping of a trace's nodes by block, so that other blocks can be written from them, and by mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from compress.formats.onnx.decoder.caches import layer_index
from compress.formats.onnx.decoder.tracing_patches import DOMAIN, Placeholder


@dataclass(frozen=True)
class NodeGroups:
    """Nodes ``before`` the blocks, of each traced block, and ``after`` them, each in order.

    ``left`` holds the hidden states at the end of each block.
    """

    before: Sequence[ir.Node]
    blocks: Sequence[Sequence[ir.Node]]
    after: Sequence[ir.Node]
    left: Mapping[int, ir.Value]


def group_nodes(graph: ir.Graph, prefixes: Sequence[str], repeats: bool) -> NodeGroups | None:
    """Divide a trace of the blocks ``prefixes``.

    Returns None if other blocks are to be written from these and cannot, because they share more than hidden states.
    """
    blocks_of = {value: {layer_index(value.name)} for value in graph.inputs if value.name.startswith("past_")}
    preceding, after, late, mixed = list[ir.Node](), list[ir.Node](), set[ir.Value](), False
    entered, left = dict[int, ir.Value](), dict[int, ir.Value]()
    blocks: list[list[ir.Node]] = [[] for _ in prefixes]
    for node in graph:
        # A node belongs to the block that its inputs or its parameters belong to.
        blocks_of_node = set[int]().union(*(blocks_of.get(value, ()) for value in node.inputs))
        mark = node.op_type if node.domain == DOMAIN else ""
        # A placeholder names its parameter or its module, which begins with the name of its block.
        for attribute in ("name", "module") if mark else ():
            text = string_attribute(node, attribute) if attribute in node.attributes else ""
            blocks_of_node |= {index for index, prefix in enumerate(prefixes) if text.startswith(f"{prefix}.")}
        if mark in (Placeholder.BLOCK_INPUT, Placeholder.SHARED_OUTPUT):
            blocks_of_node = {node.attributes["index"].as_int()}
        if mark == Placeholder.BLOCK_INPUT:
            entered[node.attributes["index"].as_int()] = node.inputs[0]
        if mark == Placeholder.BLOCK_OUTPUT:
            left[node.attributes["index"].as_int()] = node.outputs[0]
            late.update(node.outputs)
        # What leaves a block belongs to none.
        blocks_of |= dict.fromkeys(
            node.outputs, set() if mark in (Placeholder.BLOCK_OUTPUT, Placeholder.SHARED_OUTPUT) else blocks_of_node
        )
        mixed = mixed or len(blocks_of_node) > 1
        if len(blocks_of_node) == 1:
            blocks[next(iter(blocks_of_node))].append(node)
        elif blocks_of_node or any(value in late for value in node.inputs):
            after.append(node)
            late.update(node.outputs)
        else:
            preceding.append(node)
    # The hidden states of each block must be those that the one before it returned.
    chained = all(entered[index] is left[index - 1] for index in range(1, len(prefixes)))
    if mixed or not chained:
        # The whole trace in its own order, as the first block's.
        return None if repeats else NodeGroups([], [list(graph), *[[] for _ in prefixes[1:]]], [], left)
    return NodeGroups(preceding, blocks, after, left)


def _is(node: ir.Node, kind: str) -> bool:
    """Return whether a node is a placeholder of that kind."""
    return bool(node.domain == DOMAIN and node.op_type == kind)


def group_linear_layers(nodes: Sequence[ir.Node]) -> dict[ir.Node, Sequence[ir.Node]]:
    """Return for each linear layer all layers of the same module with the same input, itself included."""
    groups: dict[tuple[ir.Value, str, int], list[ir.Node]] = {}
    for node in nodes:
        if _is(node, Placeholder.LINEAR):
            parent = string_attribute(node, "module").rpartition(".")[0]
            groups.setdefault((node.inputs[0], parent, node.attributes["transposed"].as_int()), []).append(node)
    return {node: group for group in groups.values() for node in group}


def find_mixtures(nodes: Sequence[ir.Node]) -> Sequence[tuple[ir.Node, Sequence[ir.Node], ir.Node]]:
    """Return for each mixture the placeholder of an expert's input, the expert's nodes, and that of its output."""
    experts = []
    for take in nodes:
        if not _is(take, Placeholder.EXPERT_INPUT):
            continue
        # The expert's nodes are those between the two placeholders.
        reached, parts = set(take.outputs), list[ir.Node]()
        for node in nodes:
            if _is(node, Placeholder.EXPERT_OUTPUT):
                if string_attribute(node, "module") == string_attribute(take, "module"):
                    experts.append((take, parts, node))
                    break
            elif any(value in reached for value in node.inputs):
                parts.append(node)
                reached.update(node.outputs)
    return experts


def string_attribute(node: ir.Node, name: str) -> str:
    """Return a string attribute of a node."""
    return str(node.attributes[name].as_string())
