"""Split of convolutions that read a concatenation: one for each part, with its own integers and scales.

On the way up of a U-Net a convolution reads the lower level's output and a skip connection. Their ranges differ
many times, in activations and in weights. With one scale the narrower half uses few of the 256 integers.
convolution([a, b], W) = convolution(a, W_a) + convolution(b, W_b) is the same in float, and each half gets its own
range (Q-Diffusion, Li et al. 2023, section 4.2, "split quantization").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import add_initializer, clean, constant
from compress.formats.onnx.int8.observers import Feed, stream_activations

_CHANNELS = 1


def split_concatenations(model: ir.Model, feeds: Iterable[Feed]) -> list[str]:
    """Split every convolution with stored weights that reads concatenated channels, in place; return their names.

    The first of ``feeds`` shows the number of channels of each part. A part's convolution and weight get the name of
    the whole with `/part_0`, `/part_1` appended. The bias is added once. Grouped convolutions stay, because a group may
    read two parts.
    """
    convolutions = [node for node in model.graph if _reads_parts(node)]
    if not convolutions:
        return []
    names = list(dict.fromkeys(str(part.name) for node in convolutions for part in _parts(node)))
    shapes = {
        name: array.shape
        for values in stream_activations(ir.to_proto(model), names, list(feeds)[:1])
        for name, array in values.items()
    }
    for node in convolutions:
        _split(model.graph, node, [shapes[str(part.name)][_CHANNELS] for part in _parts(node)])
    clean(model)
    return [str(node.name) for node in convolutions]


def _reads_parts(node: ir.Node) -> bool:
    """Return whether a node is a convolution of concatenated channels that can be split."""
    if node.op_type != "Conv" or node.attributes.get_int("group", 1) != 1 or constant(node.inputs[1]) is None:
        return False
    joined = node.inputs[0].producer() if node.inputs[0] is not None else None
    return (
        joined is not None
        and joined.op_type == "Concat"
        and joined.attributes.get_int("axis", 0) == _CHANNELS
        and len(joined.inputs) > 1
        and all(part is not None and constant(part) is None for part in joined.inputs)
    )


def _parts(node: ir.Node) -> Sequence[ir.Value]:
    """Return the concatenated values."""
    joined = node.inputs[0].producer()
    assert joined is not None, "it reads a concatenation"
    return [part for part in joined.inputs if part is not None]


def _split(graph: ir.Graph, node: ir.Node, channels: Sequence[int]) -> None:
    """Replace one convolution by a sum of convolutions."""
    weight, old = constant(node.inputs[1]), node.outputs[0]
    assert weight is not None, "weights are stored"
    attributes: Mapping[str, ir.Attr] = dict(node.attributes)
    ends = np.cumsum(channels)
    new_nodes: list[ir.Node] = []
    for index, (part, piece) in enumerate(zip(_parts(node), np.split(weight, ends[:-1], axis=1), strict=True)):
        stored = add_initializer(graph, f"{node.inputs[1].name}/part_{index}", piece)
        # The bias belongs to the first part only, so that it is added once.
        bias = [] if index else list(node.inputs[2:])
        new_nodes.append(ir.node("Conv", [part, stored, *bias], attributes, name=f"{node.name}/part_{index}"))
        if index:
            sums = [new_nodes[-2].outputs[0], new_nodes[-1].outputs[0]]
            new_nodes.append(ir.node("Add", sums, name=f"{node.name}/sum_{index}"))
    for new_node in new_nodes:
        new_node.outputs[0].name = f"{new_node.name}_output"
        new_node.outputs[0].type, new_node.outputs[0].shape = old.type, old.shape
    graph.insert_before(node, new_nodes)
    new, name = new_nodes[-1].outputs[0], old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name
