"""Which nodes of a trace belong together: to a block, so that others like it are written as it is, or to a mixture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from compress.formats.onnx.decoder import plug
from compress.formats.onnx.decoder.caches import layer_of
from compress.formats.onnx.decoder.trace import Trace


class NotRepeatableError(Exception):
    """Blocks share more than their stream, so that none can be written by itself."""


@dataclass(frozen=True)
class Sections:
    """Nodes ``before`` the blocks, of each traced block, and ``after`` them, each in order.

    ``left``: the stream as it comes out of a block, by the block.
    """

    before: Sequence[ir.Node]
    blocks: Sequence[Sequence[ir.Node]]
    after: Sequence[ir.Node]
    left: Mapping[int, ir.Value]
    kinds: Sequence[int]
    repeats: bool

    def kind(self, index: int) -> int:
        """The traced block that block ``index`` is written as."""
        return index if index < len(self.blocks) else self.kinds[index]


def find_sections(trace: Trace) -> Sections:
    """Divide a trace. Raises `NotRepeatableError` where blocks must be repeated and cannot."""
    nodes = list(trace.program.graph)
    marks = {
        kind: {node.attributes["index"].as_int(): node for node in nodes if _is(node, kind)}
        for kind in (plug.ENTER, plug.LEAVE)
    }
    left = {index: node.outputs[0] for index, node in marks[plug.LEAVE].items()}
    repeats = trace.traced < len(trace.blocks)
    owners = _owners(trace, nodes)
    before: list[ir.Node] = []
    after: list[ir.Node] = []
    blocks: list[list[ir.Node]] = [[] for _ in range(trace.traced)]
    late: set[ir.Value] = set()
    for node in nodes:
        own = owners[node]
        if _is(node, plug.LEAVE):
            late.update(node.outputs)
        if len(own) == 1:
            blocks[next(iter(own))].append(node)
        elif own or any(value in late for value in node.inputs):
            after.append(node)
            late.update(node.outputs)
        else:
            before.append(node)
    chained = all(marks[plug.ENTER][index].inputs[0] is left[index - 1] for index in range(1, trace.traced))
    mixed = any(len(own) > 1 for own in owners.values())
    if mixed or not chained:
        if repeats:
            raise NotRepeatableError
        # Nothing is repeated: the whole trace in its own order, as the first block's.
        return Sections([], [nodes, *[[] for _ in range(trace.traced - 1)]], [], left, [], False)
    return Sections(before, blocks, after, left, [block.kind for block in trace.blocks], repeats)


def _owners(trace: Trace, nodes: Sequence[ir.Node]) -> dict[ir.Node, set[int]]:
    """The blocks in whose part of the trace each node lies; marks of leaving belong to what they leave."""
    owner_of: dict[ir.Value, set[int]] = {}
    for value in trace.program.graph.inputs:
        if (value.name or "").startswith("past_"):
            owner_of[value] = {layer_of(value.name or "")}
    prefixes = {f"{block.prefix}.": index for index, block in enumerate(trace.blocks[: trace.traced])}
    owners: dict[ir.Node, set[int]] = {}
    for node in nodes:
        own: set[int] = set()
        for value in node.inputs:
            own |= owner_of.get(value, set()) if value is not None else set()
        for attribute in ("name", "module"):
            if node.domain == plug.DOMAIN and attribute in node.attributes:
                text = node.attributes[attribute].as_string()
                own |= {index for prefix, index in prefixes.items() if text.startswith(prefix)}
        if _is(node, plug.ENTER) or _is(node, plug.SHARE):
            own = {node.attributes["index"].as_int()}
        owners[node] = own
        for output in node.outputs:
            owner_of[output] = set() if _is(node, plug.LEAVE) or _is(node, plug.SHARE) else own
    return owners


def _is(node: ir.Node, kind: str) -> bool:
    return bool(node.domain == plug.DOMAIN and node.op_type == kind)


def joined_layers(nodes: Sequence[ir.Node]) -> dict[ir.Node, Sequence[ir.Node]]:
    """Each linear layer with all those beside it, itself included, that are given the same value."""
    groups: dict[tuple[ir.Value, str, int], list[ir.Node]] = {}
    for node in nodes:
        if node.domain == plug.DOMAIN and node.op_type == plug.LINEAR:
            parent = text_of(node, "module").rpartition(".")[0]
            groups.setdefault((given_to(node, 0), parent, node.attributes["transposed"].as_int()), []).append(node)
    return {node: group for group in groups.values() for node in group}


def mixtures(nodes: Sequence[ir.Node]) -> Sequence[tuple[ir.Node, Sequence[ir.Node], ir.Node]]:
    """Each mixture: the node that gives an expert its rows, those of the expert, and the one that takes them in."""
    found = []
    for take in nodes:
        if take.domain != plug.DOMAIN or take.op_type != plug.TAKE:
            continue
        reached, parts = set(take.outputs), list[ir.Node]()
        for node in nodes:
            if node.domain == plug.DOMAIN and node.op_type == plug.GIVE:
                if text_of(node, "module") == text_of(take, "module"):
                    found.append((take, parts, node))
                    break
            elif any(value in reached for value in node.inputs):
                parts.append(node)
                reached.update(node.outputs)
    return found


def text_of(node: ir.Node, name: str) -> str:
    return str(node.attributes[name].as_string())


def given_to(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value
