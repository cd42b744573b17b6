"""Which nodes of a trace belong together: to a block, so that others like it are written as it is, or to a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from compress.formats.onnx.decoder.caches import layer_index
from compress.formats.onnx.decoder.tracing_patches import DOMAIN, Placeholder


@dataclass(frozen=True)
class NodeGroups:
    """Nodes ``before`` the blocks, of each traced block, and ``after`` them, each in order.

    ``left``: the stream as it comes out of a block, by the block.
    """

    before: Sequence[ir.Node]
    blocks: Sequence[Sequence[ir.Node]]
    after: Sequence[ir.Node]
    left: Mapping[int, ir.Value]


def group_nodes(graph: ir.Graph, prefixes: Sequence[str], repeats: bool) -> NodeGroups | None:
    """Divide a trace of the blocks ``prefixes``.

    None where others are to be written as these are, and cannot: they share more than their stream.
    """
    blocks_of = {value: {layer_index(value.name)} for value in graph.inputs if value.name.startswith("past_")}
    before, after, late, mixed = list[ir.Node](), list[ir.Node](), set[ir.Value](), False
    entered, left = dict[int, ir.Value](), dict[int, ir.Value]()
    blocks: list[list[ir.Node]] = [[] for _ in prefixes]
    for node in graph:
        own = set[int]().union(*(blocks_of.get(value, ()) for value in node.inputs))
        mark = node.op_type if node.domain == DOMAIN else ""
        for attribute in ("name", "module") if mark else ():
            text = string_attribute(node, attribute) if attribute in node.attributes else ""
            own |= {index for index, prefix in enumerate(prefixes) if text.startswith(f"{prefix}.")}
        if mark in (Placeholder.BLOCK_INPUT, Placeholder.SHARED_OUTPUT):
            own = {node.attributes["index"].as_int()}
        if mark == Placeholder.BLOCK_INPUT:
            entered[node.attributes["index"].as_int()] = node.inputs[0]
        if mark == Placeholder.BLOCK_OUTPUT:
            left[node.attributes["index"].as_int()] = node.outputs[0]
            late.update(node.outputs)
        # What leaves a block belongs to none.
        blocks_of |= dict.fromkeys(
            node.outputs, set() if mark in (Placeholder.BLOCK_OUTPUT, Placeholder.SHARED_OUTPUT) else own
        )
        mixed = mixed or len(own) > 1
        if len(own) == 1:
            blocks[next(iter(own))].append(node)
        elif own or any(value in late for value in node.inputs):
            after.append(node)
            late.update(node.outputs)
        else:
            before.append(node)
    chained = all(entered[index] is left[index - 1] for index in range(1, len(prefixes)))
    if mixed or not chained:
        # The whole trace in its own order, as the first block's.
        return None if repeats else NodeGroups([], [list(graph), *[[] for _ in prefixes[1:]]], [], left)
    return NodeGroups(before, blocks, after, left)


def _is(node: ir.Node, kind: str) -> bool:
    return bool(node.domain == DOMAIN and node.op_type == kind)


def group_linear_layers(nodes: Sequence[ir.Node]) -> dict[ir.Node, Sequence[ir.Node]]:
    """Each linear layer with all those beside it, itself included, that are given the same value."""
    groups: dict[tuple[ir.Value, str, int], list[ir.Node]] = {}
    for node in nodes:
        if _is(node, Placeholder.LINEAR):
            parent = string_attribute(node, "module").rpartition(".")[0]
            groups.setdefault((node.inputs[0], parent, node.attributes["transposed"].as_int()), []).append(node)
    return {node: group for group in groups.values() for node in group}


def find_mixtures(nodes: Sequence[ir.Node]) -> Sequence[tuple[ir.Node, Sequence[ir.Node], ir.Node]]:
    """Each mixture: the node that gives an expert its rows, those of the expert, and the one that takes them in."""
    found = []
    for take in nodes:
        if not _is(take, Placeholder.EXPERT_INPUT):
            continue
        reached, parts = set(take.outputs), list[ir.Node]()
        for node in nodes:
            if _is(node, Placeholder.EXPERT_OUTPUT):
                if string_attribute(node, "module") == string_attribute(take, "module"):
                    found.append((take, parts, node))
                    break
            elif any(value in reached for value in node.inputs):
                parts.append(node)
                reached.update(node.outputs)
    return found


def string_attribute(node: ir.Node, name: str) -> str:
    return str(node.attributes[name].as_string())
