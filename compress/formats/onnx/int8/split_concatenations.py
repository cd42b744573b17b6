"""A convolution that reads a concatenation becomes one for each part: integers, scales and zero points of their own.

On the way up of a U-Net a convolution reads what comes from below beside what was kept on the way down, and the two
differ in range many times over, in activations and in weights: with one scale the narrower half is left few of the 256
integers. convolution([a, b], W) = convolution(a, W_a) + convolution(b, W_b) is the same in float, and each half has its
own range then (Q-Diffusion, Li et al. 2023, section 4.2, "split quantization").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import add_initializer, clean, constant
from compress.formats.onnx.int8.observers import Feed, stream_activations

_CHANNELS = 1


def split_concatenations(model: ir.Model, feeds: Iterable[Feed]) -> list[str]:
    """Split every convolution with stored weights that reads a concatenation of channels, in place; their names.

    The first of ``feeds`` tells how many channels each part has. A part's convolution is called as the whole was, with
    `/part_0`, `/part_1` behind; so is its weight. The bias is added once. Convolutions in groups are left alone:
    a group may read two parts.
    """
    found = [node for node in model.graph if _reads_parts(node)]
    if not found:
        return []
    names = list(dict.fromkeys(str(part.name) for node in found for part in _parts(node)))
    shapes = {
        name: array.shape
        for values in stream_activations(ir.to_proto(model), names, list(feeds)[:1])
        for name, array in values.items()
    }
    for node in found:
        _split(model.graph, node, [shapes[str(part.name)][_CHANNELS] for part in _parts(node)])
    clean(model)
    return [str(node.name) for node in found]


def _reads_parts(node: ir.Node) -> bool:
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
    joined = node.inputs[0].producer()
    assert joined is not None, "it reads a concatenation"
    return [part for part in joined.inputs if part is not None]


def _split(graph: ir.Graph, node: ir.Node, channels: Sequence[int]) -> None:
    weight, old = constant(node.inputs[1]), node.outputs[0]
    assert weight is not None, "weights are stored"
    attributes: Mapping[str, ir.Attr] = dict(node.attributes)
    ends = np.cumsum(channels)
    made: list[ir.Node] = []
    for place, (part, piece) in enumerate(zip(_parts(node), np.split(weight, ends[:-1], axis=1), strict=True)):
        stored = add_initializer(graph, f"{node.inputs[1].name}/part_{place}", piece)
        bias = [] if place else list(node.inputs[2:])
        made.append(ir.node("Conv", [part, stored, *bias], attributes, name=f"{node.name}/part_{place}"))
        if place:
            sums = [made[-2].outputs[0], made[-1].outputs[0]]
            made.append(ir.node("Add", sums, name=f"{node.name}/sum_{place}"))
    for each in made:
        each.outputs[0].name = f"{each.name}_output"
        each.outputs[0].type, each.outputs[0].shape = old.type, old.shape
    graph.insert_before(node, made)
    new, name = made[-1].outputs[0], old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name
