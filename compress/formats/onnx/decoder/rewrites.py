"""Rewrites of groups of nodes in a traced decoder of any family into single operators of ONNX Runtime."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from compress.formats.onnx.decoder.caches import layer_index
from compress.formats.onnx.decoder.graph_builder import node_like
from compress.formats.onnx.decoder.tracing_patches import DOMAIN, Placeholder
from compress.formats.onnx.graph_edits import MICROSOFT, producer


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


_NORM = "SimplifiedLayerNormalization"
_SKIPS = {_NORM: "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}
_SAME = (0, 2, 1, 3)
_ATTENTION = ("MultiHeadAttention", Placeholder.CROSS_ATTENTION)


def tidy(model: ir.Model, few_rows: bool = True) -> None:
    """Apply every rewrite, in place, and drop unused nodes.

    Norms are fused with sums only where a call has ``few_rows``. Over an encoder's thousands of rows the two are faster
    apart.
    """
    for rewrite in (
        _norm_before_turning,
        _reshape_of_reshape,
        _constant_shapes,
        _packed_heads,
        _quick_gelu,
        _plain_gather,
        _scaled_queries,
        *([_skip_norms] if few_rows else []),
    ):
        # The list is a copy, since rewrites add and remove nodes.
        for node in list(model.graph):
            rewrite(model.graph, node)
        RemoveUnusedNodesPass()(model)
    # Recorded shapes and types of values in between may contradict the rewritten nodes.
    model.graph.sort()
    for value in (*model.graph.initializers.values(), *(output for node in model.graph for output in node.outputs)):
        if not value.is_graph_output():
            value.shape = value.type = None


def _put(
    graph: ir.Graph,
    successor: ir.Node,
    like: ir.Node,
    kind: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, object],
    replaced: Mapping[int, ir.Value],
) -> None:
    """Insert a node whose outputs replace existing values.

    Args:
        graph: The graph.
        successor: Node to insert before.
        like: Node whose module the new node belongs to.
        kind: Operator type.
        inputs: Inputs of the node.
        attributes: Attributes of the node.
        replaced: The value that each output replaces, by index of the output.
    """
    node = node_like(like, kind, kind, inputs, attributes, "" if kind == _NORM else MICROSOFT, max(replaced) + 1)
    graph.insert_before(successor, node)
    for index, new in enumerate(node.outputs):
        if (old := replaced.get(index)) is None:
            new.name = ""
            continue
        new.shape, new.type = old.shape, old.type
        if not old.is_graph_output():
            ir.convenience.replace_all_uses_with(old, new)


def _shape(value: ir.Value | None) -> list[int | str] | None:
    """Return the axes of a value, or None if one is unknown."""
    if value is None or value.shape is None:
        return None
    axes = [axis if isinstance(axis, int) else axis.value for axis in value.shape]
    return None if None in axes else axes


def _norm_before_turning(graph: ir.Graph, node: ir.Node) -> None:
    """Move a norm over the last axis before the transposes around it, which then vanish."""
    norm = producer(node.inputs[0], _NORM) if node.op_type == "Transpose" else None
    turned = None if norm is None else producer(norm.inputs[0], "Transpose")
    if norm is None or turned is None:
        return
    orders = {tuple(transpose.attributes["perm"].as_ints()) for transpose in (node, turned)}
    # Another reader would still need the transposed norm.
    if orders == {_SAME} and len(norm.outputs[0].uses()) == 1:
        inputs = [turned.inputs[0], norm.inputs[1]]
        _put(graph, node, norm, _NORM, inputs, norm.attributes, {0: node.outputs[0]})


def _reshape_of_reshape(graph: ir.Graph, node: ir.Node) -> None:
    """Merge two reshapes, and drop a reshape to the original shape."""
    inner = producer(node.inputs[0], "Reshape") if node.op_type == "Reshape" else None
    target_shape, old = _shape(node.outputs[0]), node.outputs[0]
    if inner is None or target_shape is None:
        return
    source, target = inner.inputs[0], ir.convenience.get_const_tensor(node.inputs[1])
    source_shape = [axis if isinstance(axis, int) else axis.value for axis in source.shape or ()]
    # With as many elements one axis at most is not known to be the same; 0 copies an axis of the input.
    if (
        source.shape is not None
        and len(source_shape) == len(target_shape)
        and sum(map(operator.ne, source_shape, target_shape)) <= 1
    ):
        if not old.is_graph_output():
            ir.convenience.replace_all_uses_with(old, source)
    elif len(inner.outputs[0].uses()) == 1 and not (target is not None and (target.numpy() == 0).any()):
        node.replace_input_with(0, source)


def _constant_shapes(graph: ir.Graph, node: ir.Node) -> None:
    """Store the target of a reshape whose axes are known or those of its input, instead of computing it."""
    if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
        return
    source_shape, target_shape = _shape(node.inputs[0]), _shape(node.outputs[0])
    if source_shape is None or target_shape is None:
        return
    target = [
        axis if isinstance(axis, int) else 0 if source_shape[index : index + 1] == [axis] else -1
        for index, axis in enumerate(target_shape)
    ]
    # A reshape can infer one axis only.
    if target.count(-1) > 1:
        return
    name = "constants.int64." + "_".join(map(str, target))
    constant = graph.initializers.get(name)
    if constant is None:
        constant = ir.val(name, const_value=ir.tensor(np.array(target, np.int64), name=name))
        graph.register_initializer(constant)
    node.replace_input_with(1, constant)
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _packed_heads(graph: ir.Graph, node: ir.Node) -> None:
    """Pass queries, keys and values side by side, as a joined product returns them, instead of splitting them."""
    split = producer(node.inputs[0], "Split") if node.op_type == "GroupQueryAttention" else None
    if split is None or list(node.inputs[:3]) != list(split.outputs):
        return
    if all(len(value.uses()) == 1 for value in split.outputs):
        for index, value in enumerate((split.inputs[0], None, None)):
            node.replace_input_with(index, value)


def _quick_gelu(graph: ir.Graph, node: ir.Node) -> None:
    """Fuse x times its sigmoid (SiLU)."""
    for value, factor in (node.inputs, node.inputs[::-1]) if node.op_type == "Mul" else ():
        sigmoid = producer(factor, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is value:
            _put(graph, node, node, "QuickGelu", [value], {"alpha": 1.0}, {0: node.outputs[0]})
            return


def _plain_gather(graph: ir.Graph, node: ir.Node) -> None:
    """Replace a `GatherND` of rows that one number each selects by `Gather`."""
    places = producer(node.inputs[1], "Unsqueeze") if node.op_type == "GatherND" else None
    if places is None or node.attributes.get_int("batch_dims", 0):
        return
    # The indices have one number each if they were unsqueezed along the last axis.
    axis, shape = ir.convenience.get_const_tensor(places.inputs[1]), _shape(places.outputs[0])
    if axis is not None and shape is not None and axis.numpy().tolist() in ([-1], [len(shape) - 1]):
        node.replace_input_with(1, places.inputs[0])
        node.op_type = "Gather"
        node.attributes.clear()


def _scaled_queries(graph: ir.Graph, node: ir.Node) -> None:
    """Move a factor of the queries into the scale of the attention."""
    scaled = producer(node.inputs[0], "Mul") if node.op_type in _ATTENTION else None
    for value, factor in (scaled.inputs, scaled.inputs[::-1]) if scaled is not None else ():
        number = None if factor is None else ir.convenience.get_const_tensor(factor)
        if number is not None and number.size == 1:
            node.replace_input_with(0, value)
            scale = node.attributes["scale"].as_float() * float(number.numpy().reshape(()))
            node.attributes["scale"] = ir.AttrFloat32("scale", scale)
            return


def _skip_norms(graph: ir.Graph, node: ir.Node) -> None:
    """Fuse an addition into the following norm, which returns the sum too."""
    skip = _SKIPS.get(node.op_type)
    if skip is None or (added := producer(node.inputs[0], "Add")) is None:
        return
    if any(fused.outputs[0].is_graph_output() for fused in (added, node)):
        return
    # The operator has no broadcasting, and both terms must be computed.
    shapes = [None if value is None or value.const_value is not None else _shape(value) for value in added.inputs]
    if shapes[0] is None or shapes[0] != shapes[1] or len(shapes[0]) != 3:
        return
    epsilon = {"epsilon": node.attributes["epsilon"].as_float()}
    inputs = [*added.inputs, *node.inputs[1:]]
    _put(graph, added, node, skip, inputs, epsilon, {0: node.outputs[0], 3: added.outputs[0]})
