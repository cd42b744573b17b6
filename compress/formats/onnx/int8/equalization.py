"""SmoothQuant and cross-layer equalization: channel scales move between operators where that costs no run time.

SmoothQuant (Xiao et al. 2023, equation 4) divides input channel j of a product by
s_j = max|x_j|^a / max|w_j|^(1 - a). The division goes into the operator that produces the channel: the gain and bias of
a normalisation that only products read, or, before the last product of an attention, the columns of the values. A
normalisation that a residual connection reads too (BERT's) is left alone, because there the division would be an
additional operator.

Cross-layer equalization (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction",
section 4.1) multiplies the channels that a convolution writes by s > 0 and divides what the next layer reads by s.
ReLU, leaky ReLU, PReLU, pooling and residual additions in between pass a factor on, so the float graph stays the same
function. One range serves all channels of an activation, and a small channel uses few of its levels; the equalization
fixes that. A `Clip` passes a factor on only where its bound is not reached. Channels that reached it on the calibration
data keep their factor 1. Others may grow up to the bound, so values beyond the calibration data are clipped, as a
calibrated range clips them too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from compress.formats.onnx.graph_edits import add_initializer, constant, input_at, producer
from compress.formats.onnx.int8.observers import ActivationStatistics
from compress.formats.onnx.int8.select_nodes import QuantizableLayer
from compress.numerics.int8_activations import smoothing_factors

_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


def smooth(
    model: ir.Model, layers: Sequence[QuantizableLayer], observed: Mapping[str, ActivationStatistics], alpha: float
) -> list[str]:
    """Even out the input channels of `MatMul` and `Gemm` by SmoothQuant, in place; return the layers concerned.

    Args:
        model: The graph.
        layers: Layers that will be quantized.
        observed: Statistics of their inputs.
        alpha: The paper's alpha, 0.5 by default there.
    """
    nodes = {str(node.name): node for node in model.graph}
    # Products that read the same value get the same factors.
    by_input: dict[ir.Value, list[ir.Node]] = {}
    for layer in layers:
        value = nodes[layer.name].inputs[0]
        if layer.operator in ("MatMul", "Gemm") and value is not None:
            by_input.setdefault(value, []).append(nodes[layer.name])
    done: list[str] = []
    for value, readers in by_input.items():
        # The division is free only if all readers are products that take it back.
        if {use.node for use in value.uses()} != set(readers) or value.is_graph_output():
            continue
        largest, weights = observed[str(value.name)].largest, [node.inputs[1] for node in readers]
        if largest is None or any(weight is None or len(weight.uses()) > 1 for weight in weights):
            continue
        factors = smoothing_factors(largest, [_columns(node) for node in readers], alpha)
        if _divide(model.graph, value, factors):
            for node, weight in zip(readers, weights, strict=True):
                # Multiply the input channels of a product's weights.
                by = factors[None, :] if node.attributes.get_int("transB", 0) else factors[:, None]
                name = f"{weight and weight.name}_smoothed"
                node.replace_input_with(1, add_initializer(model.graph, name, _weight(node) * by))
                done.append(str(node.name))
    return done


def _divide(graph: ir.Graph, value: ir.Value, factors: np.ndarray) -> bool:
    """Divide the channels of ``value`` in the node that computes them; return False if that is impossible."""
    # The gain and bias of a normalisation absorb the division.
    norm = producer(value, *_NORMS)
    if norm is not None and norm.outputs[0] is value:
        return _scale_inputs(graph, norm, range(1, len(norm.inputs)), 1 / factors)
    # The last third of an unpacked attention's weights and biases computes its values.
    attention = producer(value, "MultiHeadAttention")
    split = None if attention is None else producer(attention.inputs[2], "Split")
    added = None if split is None else producer(split.inputs[0], "Add")
    product = None if added is None else producer(added.inputs[0], "MatMul")
    if attention is None or split is None or added is None or product is None:
        return False
    # The packed product computes queries, keys and values, in this order.
    by = np.concatenate([np.ones(2 * factors.size, np.float32), 1 / factors])
    weight = constant(product.inputs[1])
    if attention.inputs[2] is not split.outputs[2] or weight is None or weight.shape[1] != by.size:
        return False
    return _scale_inputs(graph, product, [1], by) and _scale_inputs(graph, added, [1], by)


def _scale_inputs(graph: ir.Graph, node: ir.Node, indices: Sequence[int], by: np.ndarray) -> bool:
    """Multiply the channels of a node's inputs ``indices``; return False if one is not stored or has others."""
    stored = [(index, value, constant(value)) for index in indices if (value := node.inputs[index]) is not None]
    arrays = [(index, value.name, array) for index, value, array in stored if array is not None]
    if len(arrays) < len(stored) or any(array.shape[-1:] != by.shape for _, _, array in arrays):
        return False
    for index, name, array in arrays:
        node.replace_input_with(index, add_initializer(graph, f"{name}_smoothed", array * by))
    return True


_ACTIVATIONS = ("Relu", "LeakyRelu", "PRelu", "Clip")
_PASSING = (*_ACTIVATIONS, *("MaxPool", "AveragePool", "GlobalAveragePool", "Flatten", "Identity", "Add"))
_REACHED = 0.999
_MARGIN = 0.95
"""Share of a `Clip`'s bound up to which a channel may be raised; other examples are slightly larger."""
_SMALLEST = 1e-3
_FEWEST = 1e-6
_SWEEPS = 20
_STILL = 1e-3


@dataclass
class ChannelGroup:
    """Values with the same channels, whose factors must be equal.

    ``writers`` are the convolutions that compute them, ``readers`` the layers that read them. ``bound`` is the lowest
    upper bound of a `Clip` among the values. ``raised`` is the factor that `apply_factors` has applied so far.
    """

    writers: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)
    values: list[ir.Value] = field(default_factory=list)
    bound: float = np.inf
    raised: np.ndarray | float = 1.0

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(_weight(self.writers[0]))


def equalize(model: ir.Model, observed: Mapping[str, ActivationStatistics], method: str) -> list[str]:
    """Even out all groups, in place; return the names of the layers whose inputs became more uniform.

    Args:
        model: The graph.
        observed: Statistics of the activations.
        method: ``weights`` is the paper's: ranges r1 of the weights that write a channel and r2 of those that read it
            both become sqrt(r1 r2), repeatedly until nothing changes. ``activations`` uses the channel's own range for
            r1, because a shared range costs accuracy where weights have per-output scales. The inputs of depthwise
            convolutions, which have a scale per channel, are raised to the largest channel.
    """
    groups = find_channel_groups(model)
    for _ in range(_SWEEPS if method == "weights" else 1):
        moved = 0.0
        # The factors of one group change the ranges that the next one sees.
        for group in groups:
            if method == "activations":
                factors = _activation_factors(group, observed)
            else:
                # Equation 11 of the paper: sqrt(r2 / r1) for the writers.
                written = [np.abs(_weight(node)).reshape(group.channels, -1).max(axis=1) for node in group.writers]
                factors = _balanced(np.maximum.reduce(written), group)
            # No value may reach a `Clip` of the group that it did not reach before.
            if np.isfinite(group.bound):
                sizes = magnitudes(group, observed)
                room = _MARGIN * group.bound / np.maximum(sizes * group.raised, _FEWEST)
                factors = np.where(sizes >= _REACHED * group.bound, 1.0, np.minimum(factors, room))
            apply_factors(model, group, factors)
            moved = max(moved, float(np.abs(np.log(factors)).max()))
        if moved < _STILL:
            break
    return [str(node.name) for group in groups for node in group.readers]


def _activation_factors(group: ChannelGroup, observed: Mapping[str, ActivationStatistics]) -> np.ndarray:
    """Return the factor of each channel from the range of its activations."""
    sizes = magnitudes(group, observed)
    largest = group.bound if np.isfinite(group.bound) else float(sizes.max())
    # A channel that is nearly nothing stays so: what it is worth is not known from so few values.
    live = sizes > _SMALLEST * largest
    # Depthwise readers have a scale per channel, so every channel may use the full range.
    if all(node.op_type == "Conv" and _weight(node).shape[1] == 1 for node in group.readers):
        return np.where(live, largest / np.where(live, sizes, 1.0), 1.0)
    factors = np.where(live, _balanced(sizes, group), 1.0)
    # Those that a bound holds fast are what the others are compared with.
    still = sizes >= _REACHED * group.bound
    return factors / np.exp(np.log(factors[still]).mean()) if still.any() else factors


def _balanced(written: np.ndarray, group: ChannelGroup) -> np.ndarray:
    """Return the root of a channel's range in the weights that read it over its range as ``written``.

    Channels that are nearly zero on one side get 1.
    """
    read: np.ndarray = np.maximum.reduce([np.abs(_columns(node)).max(axis=1) for node in group.readers])
    live = (written > _FEWEST) & (read > _FEWEST)
    return np.where(live, np.sqrt(np.where(live, read, 1.0) / np.where(live, written, 1.0)), 1.0)


def find_channel_groups(model: ir.Model) -> list[ChannelGroup]:
    """Return all groups of values in which a factor per channel can be applied and undone."""
    visited: set[ir.Value] = set()
    groups = []
    for node in model.graph:
        if node.op_type == "Conv" and node.outputs[0] not in visited:
            group = _collect(node.outputs[0])
            visited.update(group.values if group is not None else ())
            if group is not None and group.readers:
                groups.append(group)
    return groups


def _collect(start: ir.Value) -> ChannelGroup | None:
    """Return the group of ``start``, or None if something in it does not pass factors on."""
    group, waiting = ChannelGroup(), [start]
    while waiting:
        value = waiting.pop()
        if value in group.values:
            continue
        group.values.append(value)
        # A graph input or output cannot be scaled.
        maker = value.producer()
        if maker is None or value.is_graph_output():
            return None
        for further in (_writes(group, maker), *(_reads(group, use.node, use.idx) for use in value.uses())):
            if further is None:
                return None
            waiting += further
    # All writers and readers must agree on the number of channels.
    sizes = {len(_weight(node)) for node in group.writers}
    fits = len(sizes) == 1 and all(len(_columns(node)) == group.channels for node in group.readers)
    return group if fits else None


def _writes(group: ChannelGroup, maker: ir.Node) -> list[ir.Value] | None:
    """Return further values of the group of a value that ``maker`` computes; None if it cannot be scaled there."""
    if maker.op_type != "Conv":
        return _passed(group, maker)
    # Weights that another node reads cannot be scaled.
    if not all(value is None or _own(value) for value in (maker.inputs[1], input_at(maker, 2))):
        return None
    group.writers.append(maker)
    return []


def _reads(group: ChannelGroup, reader: ir.Node, index: int) -> list[ir.Value] | None:
    """Return further values of the group of a value that ``reader`` reads; None if it cannot be scaled there."""
    if reader.op_type not in ("Conv", "Gemm", "MatMul") or index != 0:
        return _passed(group, reader)
    if not _own(reader.inputs[1]) or reader.attributes.get_int("transA", 0):
        return None
    group.readers.append(reader)
    return []


def _passed(group: ChannelGroup, node: ir.Node) -> list[ir.Value] | None:
    """Return the inputs and outputs of a node that passes factors on, or None."""
    if node.op_type not in _PASSING:
        return None
    computed = [value for value in node.inputs if value is not None and constant(value) is None]
    # A stored addend would have to be scaled too.
    if node.op_type == "Add" and len(computed) < 2:
        return None
    if node.op_type == "Clip":
        low, high = (constant(input_at(node, index)) for index in (1, 2))
        if low is None or high is None or float(low) != 0:
            return None
        group.bound = min(group.bound, float(high))
    # A flattened image would mix channels and positions.
    if node.op_type == "Flatten" and producer(node.inputs[0], "GlobalAveragePool") is None:
        return None
    return [*computed, *node.outputs[:1]]


def _own(value: ir.Value | None) -> bool:
    """Return whether a value is stored as float32 and read by one node only."""
    array = constant(value)
    return value is not None and array is not None and array.dtype == np.float32 and len(list(value.uses())) == 1


def _weight(node: ir.Node) -> np.ndarray:
    """Return the stored weights of a layer."""
    array = constant(node.inputs[1])
    assert array is not None, "writers and readers have stored weights"
    return array


def _columns(node: ir.Node) -> np.ndarray:
    """Return a reader's weights as [channels, rest]; a row holds the weights of one channel."""
    weight = _weight(node)
    if node.op_type != "Conv":
        return weight.T if node.attributes.get_int("transB", 0) else weight
    groups = node.attributes.get_int("group", 1)
    # Each group reads its own channels.
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return np.swapaxes(split, 1, 2).reshape(groups * weight.shape[1], -1)


def magnitudes(group: ChannelGroup, observed: Mapping[str, ActivationStatistics]) -> np.ndarray:
    """Return the greatest value of each channel [channels] among values that are quantized.

    Values before an activation function are not quantized.
    """
    quantized = [value for value in group.values if any(use.node.op_type not in _ACTIVATIONS for use in value.uses())]
    ranges = [observed[str(value.name)].largest for value in quantized if str(value.name) in observed]
    largest: np.ndarray = np.maximum.reduce(
        [sizes for sizes in ranges if sizes is not None and len(sizes) == group.channels]
    )
    return largest


def apply_factors(model: ir.Model, group: ChannelGroup, factors: np.ndarray) -> None:
    """Multiply channels by ``factors`` [channels] in the writers' weights and divide in the readers', in place."""
    graph = model.graph
    group.raised = group.raised * factors
    for node in group.writers:
        shape = (-1, *[1] * (_weight(node).ndim - 1))
        _replace(graph, node, 1, _weight(node) * factors.reshape(shape))
        if (bias := constant(input_at(node, 2))) is not None:
            _replace(graph, node, 2, bias * factors)
    for node in group.readers:
        weight = _weight(node)
        if node.op_type == "Conv":
            groups = node.attributes.get_int("group", 1)
            # Every output of a group reads the same channels.
            by = np.repeat(factors.reshape(groups, 1, -1), weight.shape[0] // groups, axis=1)
            by = by.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        else:
            by = factors[None, :] if node.attributes.get_int("transB", 0) else factors[:, None]
        _replace(graph, node, 1, weight / by)


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> None:
    """Store other values for the input ``index`` of a node under the same name."""
    old = node.inputs[index]
    assert old is not None, "what is replaced is stored"
    name = str(old.name)
    graph.initializers.pop(name, None)
    node.replace_input_with(index, add_initializer(graph, name, array.astype(np.float32)))
