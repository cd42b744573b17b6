"""Removal of `QuantizeLinear` and `DequantizeLinear` that no CPU kernel uses, and of concatenations in between.

Other quantizers put them where other runtimes benefit: around additions, lookups, products of two activations. ONNX
Runtime computes those in float, so such a pair costs time twice, and accuracy. Layers that stay float between
integers are protected from ONNX Runtime's own rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import add_initializer, clean, constant, input_at, producer, replace_node
from compress.formats.onnx.int8.fuse_integer_ops import quantized_source
from compress.formats.onnx.int8.observers import Feed, stream_activations
from compress.formats.onnx.int8.select_nodes import BRIDGES

_BELOW_ZERO_TOO = ("Add", "Conv", "MatMul", "Gemm", "BatchNormalization", "Concat")

_CHANNELS = 1


def drop_redundant_qdq(model: ir.Model) -> int:
    """Lead readers that stay float past the pairs, in place; return how many readers.

    Stored integers that only such readers use become float again.
    """
    count = 0
    # A removed pair may make the pair before it redundant.
    while changed := sum(_lead_past(model.graph, node) for node in list(model.graph)):
        count += changed
    clean(model)
    return count


def _lead_past(graph: ir.Graph, node: ir.Node) -> int:
    """Return the number of readers of a node's dequantized value that now read the original."""
    uses = node.outputs[0].uses() if node.op_type == "DequantizeLinear" else ()
    if not (idle := [use for use in uses if not _useful(use.node)]):
        return 0
    source, maker = node.inputs[0], producer(node.inputs[0])
    # Quantizations that make an integer kernel or replace an activation function stay.
    if maker is not None and _affects_producer(maker):
        return 0
    if maker is not None and maker.op_type == "QuantizeLinear":
        original = maker.inputs[0]
    # Stored integers become float again.
    elif source is not None and constant(source) is not None:
        original = add_initializer(graph, f"{source.name}_float", restored(node))
    else:
        return 0
    for use in idle:
        use.node.replace_input_with(use.idx, original)
    return len(idle)


def _affects_producer(node: ir.Node) -> bool:
    """Return whether a quantization gives the convolution before it an integer kernel, or replaces a `Relu`."""
    maker = producer(node.inputs[0])
    activation = producer(node.inputs[0], "Relu", "Clip")
    convolution = producer(activation.inputs[0] if activation is not None else node.inputs[0], "Conv")
    if convolution is not None and _useful(convolution):
        return True
    # The quantizer removed a `Relu` if negative values have no integer.
    zero = constant(input_at(node, 2)) if node.op_type == "QuantizeLinear" else None
    no_negative = zero is not None and zero.size == 1 and zero.item() == np.iinfo(zero.dtype).min
    return no_negative and maker is not None and maker.op_type in _BELOW_ZERO_TOO


def _useful(node: ir.Node) -> bool:
    """Return whether a reader of dequantized values becomes an integer kernel."""
    if node.op_type in ("MatMul", "Gemm"):
        activations, weight = (quantized_source(value) for value in node.inputs[:2])
        return activations is not None and weight is not None and constant(weight.integers) is not None
    if node.op_type == "Conv":
        return all(quantized_source(value) is not None for value in node.inputs[:2])
    # A bridge is an integer kernel if everything around it is integers.
    if node.op_type in BRIDGES:
        computed = [value for value in node.inputs if value is not None and constant(value) is None]
        readers = [use.node for output in node.outputs for use in output.uses()]
        return all(quantized_source(value) is not None for value in computed) and all(
            reader.op_type == "QuantizeLinear" for reader in readers
        )
    return False


def restored(node: ir.Node) -> np.ndarray:
    """Return the float32 array of a `DequantizeLinear` of stored integers."""
    integers, scale, zero = (constant(input_at(node, index)) for index in range(3))
    assert integers is not None and scale is not None, "stored integers have stored scales"
    shape = [1] * integers.ndim
    if scale.ndim and scale.size > 1:
        # Scales of channels apply along the axis of the operator.
        shape[node.attributes.get_int("axis", 1)] = scale.size
    shift = 0.0 if zero is None else zero.astype(np.float32).reshape(shape if zero.size > 1 else ())
    array: np.ndarray = (integers.astype(np.float32) - shift) * scale.reshape(shape if scale.size > 1 else ())
    return array.astype(np.float32)


_OPERATORS = ("Conv", "ConvTranspose", "Gemm")


def protect_float_layers(model: ir.Model) -> list[str]:
    """Give the input of each float layer a scale per channel, in place; return the layers' names.

    ONNX Runtime rounds the float weights of a layer whose input comes from a `DequantizeLinear` with one scale, to 8
    bits with one scale for the whole tensor, when it loads a graph (its WeightBiasQuantization). It skips inputs that
    are dequantized with a scale per channel. Such layers get the same scale once for each channel, which computes the
    same numbers.
    """
    protected = []
    for node in list(model.graph):
        channels = _channels(node) if node.op_type in _OPERATORS else None
        source = quantized_source(node.inputs[0]) if channels is not None else None
        if channels is None or source is None:
            continue
        scale = constant(source.scale)
        # Scales per channel protect the layer already.
        if scale is None or scale.size != 1:
            continue
        name = f"{node.name}_input"
        alike = add_initializer(model.graph, f"{name}_scale", np.full(channels, scale.item(), scale.dtype))
        inputs = [source.integers, alike]
        zero = constant(source.zero_point)
        if zero is not None:
            value = np.full(channels, zero.item(), zero.dtype)
            inputs.append(add_initializer(model.graph, f"{name}_zero_point", value))
        old = node.inputs[0]
        dequantize = ir.node("DequantizeLinear", inputs, attributes={"axis": 1}, name=f"{name}_DequantizeLinear")
        dequantize.outputs[0].name = f"{name}_DequantizeLinear_Output"
        assert old is not None, "it is dequantized"
        dequantize.outputs[0].type, dequantize.outputs[0].shape = old.type, old.shape
        model.graph.insert_before(node, dequantize)
        node.replace_input_with(0, dequantize.outputs[0])
        protected.append(str(node.name))
    clean(model)
    return protected


def _channels(node: ir.Node) -> int | None:
    """Return the number of input channels of a layer with stored float weights, or None for another node."""
    array = constant(node.inputs[1])
    if array is None or array.dtype != np.float32:
        return None
    if node.op_type == "Gemm":
        if node.attributes.get_int("transA", 0):
            return None
        return int(array.shape[1 if node.attributes.get_int("transB", 0) else 0])
    if node.op_type == "ConvTranspose":
        return int(array.shape[0])
    return int(array.shape[1]) * int(node.attributes.get_int("group", 1))


def split_concatenations(model: ir.Model, feeds: Iterable[Feed]) -> list[str]:
    """Split every convolution with stored weights that reads concatenated channels, in place; return their names.

    The first of ``feeds`` shows the number of channels of each part. A part's convolution and weight get the name of
    the whole with `/part_0`, `/part_1` appended. The bias is added once. Grouped convolutions stay, because a group may
    read two parts.
    """
    parts_of = {node: parts for node in model.graph if len(parts := _concatenated(node)) > 1}
    if not parts_of:
        return []
    names = list(dict.fromkeys(str(part.name) for parts in parts_of.values() for part in parts))
    shapes = {
        name: array.shape
        for values in stream_activations(ir.to_proto(model), names, list(feeds)[:1])
        for name, array in values.items()
    }
    for node, parts in parts_of.items():
        _split(model.graph, node, parts, [shapes[str(part.name)][_CHANNELS] for part in parts])
    clean(model)
    return [str(node.name) for node in parts_of]


def _concatenated(node: ir.Node) -> list[ir.Value]:
    """Return the values whose channels a convolution reads side by side; none if it cannot be split by them."""
    if node.op_type != "Conv" or node.attributes.get_int("group", 1) != 1 or constant(node.inputs[1]) is None:
        return []
    joined = producer(node.inputs[0], "Concat")
    if joined is None or joined.attributes.get_int("axis", 0) != _CHANNELS:
        return []
    computed = [part for part in joined.inputs if part is not None and constant(part) is None]
    return computed if len(computed) == len(joined.inputs) else []


def _split(graph: ir.Graph, node: ir.Node, parts: Sequence[ir.Value], channels: Sequence[int]) -> None:
    """Replace one convolution by a sum of convolutions, one for each of ``parts`` with so many ``channels``."""
    weight = constant(node.inputs[1])
    assert weight is not None, "weights are stored"
    attributes: Mapping[str, ir.Attr] = dict(node.attributes)
    new_nodes: list[ir.Node] = []
    pieces = np.split(weight, np.cumsum(channels)[:-1], axis=1)
    for index, (part, piece) in enumerate(zip(parts, pieces, strict=True)):
        stored = add_initializer(graph, f"{node.inputs[1].name}/part_{index}", piece)
        # The bias belongs to the first part only, so that it is added once.
        bias = [] if index else list(node.inputs[2:])
        new_nodes.append(ir.node("Conv", [part, stored, *bias], attributes, name=f"{node.name}/part_{index}"))
        if index:
            sums = [new_nodes[-2].outputs[0], new_nodes[-1].outputs[0]]
            new_nodes.append(ir.node("Add", sums, name=f"{node.name}/sum_{index}"))
    for new_node in new_nodes:
        new_node.outputs[0].name = f"{new_node.name}_output"
    replace_node(graph, node, new_nodes)
