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

from compress.formats.onnx.graph_edits import add_initializer, constant
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
    products = {layer.name: nodes[layer.name] for layer in layers if layer.operator in ("MatMul", "Gemm")}
    # Products that read the same value get the same factors.
    by_input: dict[ir.Value, list[ir.Node]] = {}
    for node in products.values():
        if node.inputs[0] is not None:
            by_input.setdefault(node.inputs[0], []).append(node)
    done: list[str] = []
    for value, readers in by_input.items():
        # The division is free only if all readers are products that take it back.
        if {use.node for use in value.uses()} != set(readers) or value.is_graph_output():
            continue
        largest = observed[str(value.name)].largest
        if largest is None or any(len(list(_weight_value(node).uses())) > 1 for node in readers):
            continue
        factors = smoothing_factors(largest, [_rows(node) for node in readers], alpha)
        if _divide(model.graph, value, factors):
            for node in readers:
                # Multiply the input channels of a product's weights.
                rows = _rows(node) * factors[:, None]
                array = rows.T if node.attributes.get_int("transB", 0) else rows
                node.replace_input_with(1, add_initializer(model.graph, f"{_weight_value(node).name}_smoothed", array))
                done.append(str(node.name))
    return done


def _weight_value(node: ir.Node) -> ir.Value:
    """Return the value of a product's weights."""
    weight = node.inputs[1]
    assert weight is not None, "a product has weights"
    return weight


def _rows(node: ir.Node) -> np.ndarray:
    """Return the weights as [channels, outputs]."""
    array = constant(_weight_value(node))
    assert array is not None, "chosen layers have stored weights"
    return array.T if node.attributes.get_int("transB", 0) else array


def _divide(graph: ir.Graph, value: ir.Value, factors: np.ndarray) -> bool:
    """Divide the channels of ``value`` in the node that computes them; return False if that is impossible."""
    node = value.producer()
    if node is None:
        return False
    # The gain and bias of a normalisation absorb the division.
    if node.op_type in _NORMS and node.outputs[0] is value:
        return _scale_inputs(graph, node, range(1, len(node.inputs)), 1 / factors)
    if node.op_type == "MultiHeadAttention":
        # Divide the last third of an unpacked attention's weights and biases, which computes its values.
        split = node.inputs[2].producer() if node.inputs[2] is not None else None
        added = split.inputs[0].producer() if split is not None and split.inputs[0] is not None else None
        if split is None or split.op_type != "Split" or added is None or added.op_type != "Add":
            return False
        product = added.inputs[0].producer() if added.inputs[0] is not None else None
        if product is None or product.op_type != "MatMul" or node.inputs[2] is not split.outputs[2]:
            return False
        # The packed product computes queries, keys and values, in this order.
        by = np.concatenate([np.ones(2 * factors.size, np.float32), 1 / factors])
        weight = constant(product.inputs[1])
        if weight is None or weight.shape[1] != by.size:
            return False
        return _scale_inputs(graph, product, [1], by) and _scale_inputs(graph, added, [1], by)
    return False


def _scale_inputs(graph: ir.Graph, node: ir.Node, indices: Sequence[int], by: np.ndarray) -> bool:
    """Multiply stored inputs of a node, and return whether all could be multiplied.

    Args:
        graph: The graph.
        node: The node.
        indices: Indices of the inputs.
        by: Factor of each channel.
    """
    stored_inputs = [(index, node.inputs[index]) for index in indices if node.inputs[index] is not None]
    arrays = [(index, value, constant(value)) for index, value in stored_inputs]
    if any(array is None or array.shape[-1:] != by.shape for _, _, array in arrays):
        return False
    for index, value, array in arrays:
        assert value is not None and array is not None, "looked at above"
        node.replace_input_with(index, add_initializer(graph, f"{value.name}_smoothed", array * by))
    return True


_PASSING = frozenset(
    (
        *("Relu", "LeakyRelu", "PRelu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool"),
        *("Flatten", "Identity", "Add"),
    )
)
_ACTIVATIONS = frozenset(("Relu", "LeakyRelu", "PRelu", "Clip"))
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
            factors = _activation_factors(group, observed) if method == "activations" else _weight_factors(group)
            factors = _within_bound(group, observed, factors)
            apply_factors(model, group, factors)
            moved = max(moved, float(np.abs(np.log(factors)).max()))
        if moved < _STILL:
            break
    return [str(node.name) for group in groups for node in group.readers]


def _weight_factors(group: ChannelGroup) -> np.ndarray:
    """Return the factor of each channel by equation 11 of the paper: sqrt(r2 / r1) for the writers."""
    written = [np.abs(_weight(node)).reshape(group.channels, -1).max(axis=1) for node in group.writers]
    return _balanced(np.maximum.reduce(written), _read_ranges(group))


def _activation_factors(group: ChannelGroup, observed: Mapping[str, ActivationStatistics]) -> np.ndarray:
    """Return the factor of each channel from the range of its activations."""
    sizes = magnitudes(group, observed)
    largest = group.bound if np.isfinite(group.bound) else float(sizes.max())
    # A channel that is nearly nothing stays so: what it is worth is not known from so few values.
    live = sizes > _SMALLEST * largest
    # Depthwise readers have a scale per channel, so every channel may use the full range.
    if all(is_depthwise(node) for node in group.readers):
        return np.where(live, largest / np.where(live, sizes, 1.0), 1.0)
    factors = np.where(live, _balanced(sizes, _read_ranges(group)), 1.0)
    # Those that a bound holds fast are what the others are compared with.
    still = sizes >= _REACHED * group.bound
    return factors / np.exp(np.log(factors[still]).mean()) if still.any() else factors


def _read_ranges(group: ChannelGroup) -> np.ndarray:
    """Return the range of the weights that read each channel."""
    ranges: np.ndarray = np.maximum.reduce([np.abs(_columns(node)).max(axis=1) for node in group.readers])
    return ranges


def _balanced(written: np.ndarray, read: np.ndarray) -> np.ndarray:
    """Return sqrt(read / written), or 1 for channels that are nearly zero on one side."""
    live = (written > _FEWEST) & (read > _FEWEST)
    return np.where(live, np.sqrt(np.where(live, read, 1.0) / np.where(live, written, 1.0)), 1.0)


def _within_bound(group: ChannelGroup, observed: Mapping[str, ActivationStatistics], factors: np.ndarray) -> np.ndarray:
    """Limit ``factors`` so that no value reaches a `Clip` of the group that it did not reach before."""
    if not np.isfinite(group.bound):
        return factors
    sizes = magnitudes(group, observed)
    room = _MARGIN * group.bound / np.maximum(sizes * group.raised, _FEWEST)
    return np.where(sizes >= _REACHED * group.bound, 1.0, np.minimum(factors, room))


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
        neighbours = _writes(group, maker)
        if neighbours is None:
            return None
        waiting += neighbours
        for use in value.uses():
            further = _reads(group, use.node, use.idx)
            if further is None:
                return None
            waiting += further
    # All writers and readers must agree on the number of channels.
    sizes = {len(_weight(node)) for node in group.writers}
    fits = len(sizes) == 1 and all(_inputs_of(node) == group.channels for node in group.readers)
    return group if fits else None


def _writes(group: ChannelGroup, maker: ir.Node) -> list[ir.Value] | None:
    """Return further values of the group of a value that ``maker`` computes; None if it cannot be scaled there."""
    # Weights that another node reads cannot be scaled.
    if maker.op_type == "Conv":
        if not _own(maker.inputs[1]) or (
            len(maker.inputs) > 2 and maker.inputs[2] is not None and not _own(maker.inputs[2])
        ):
            return None
        group.writers.append(maker)
        return []
    return _passed(group, maker)


def _reads(group: ChannelGroup, reader: ir.Node, index: int) -> list[ir.Value] | None:
    """Return further values of the group of a value that ``reader`` reads; None if it cannot be scaled there."""
    if reader.op_type in ("Conv", "Gemm", "MatMul") and index == 0:
        if not _own(reader.inputs[1]) or reader.attributes.get_int("transA", 0):
            return None
        group.readers.append(reader)
        return []
    return _passed(group, reader)


def _passed(group: ChannelGroup, node: ir.Node) -> list[ir.Value] | None:
    """Return the inputs and outputs of a node that passes factors on, or None."""
    if node.op_type not in _PASSING:
        return None
    computed = [value for value in node.inputs if value is not None and constant(value) is None]
    # A stored addend would have to be scaled too.
    if node.op_type == "Add" and len(computed) < 2:
        return None
    if node.op_type == "Clip":
        low, high = (constant(value) for value in (*node.inputs[1:3], None, None)[:2])
        if low is None or high is None or float(low) != 0:
            return None
        group.bound = min(group.bound, float(high))
    # A flattened image would mix channels and positions.
    if node.op_type == "Flatten":
        producer = node.inputs[0].producer() if node.inputs[0] is not None else None
        if producer is None or producer.op_type != "GlobalAveragePool":
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


def _inputs_of(node: ir.Node) -> int:
    """Return the number of channels that a layer reads."""
    weight = _weight(node)
    if node.op_type == "Conv":
        return int(weight.shape[1]) * int(node.attributes.get_int("group", 1))
    return int(weight.shape[1] if node.attributes.get_int("transB", 0) else weight.shape[0])


def _columns(node: ir.Node) -> np.ndarray:
    """Return a reader's weights as [channels, rest]; a row holds the weights of one channel."""
    weight = _weight(node)
    if node.op_type != "Conv":
        return weight.T if node.attributes.get_int("transB", 0) else weight
    groups = node.attributes.get_int("group", 1)
    # Each group reads its own channels.
    split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return np.swapaxes(split, 1, 2).reshape(groups * weight.shape[1], -1)


def is_depthwise(node: ir.Node) -> bool:
    """Return whether each output reads one channel, so that per-output scales absorb a factor completely."""
    return bool(node.op_type == "Conv" and _weight(node).shape[1] == 1)


def magnitudes(group: ChannelGroup, observed: Mapping[str, ActivationStatistics]) -> np.ndarray:
    """Return the greatest value of each channel [channels] among values that are quantized.

    Values before an activation function are not quantized.
    """
    quantized = [value for value in group.values if any(use.node.op_type not in _ACTIVATIONS for use in value.uses())]
    ranges = [observed[str(value.name)].largest for value in quantized if str(value.name) in observed]
    channel_ranges = [
        channel_range for channel_range in ranges if channel_range is not None and len(channel_range) == group.channels
    ]
    largest: np.ndarray = np.maximum.reduce(channel_ranges)
    return largest


def apply_factors(model: ir.Model, group: ChannelGroup, factors: np.ndarray) -> None:
    """Multiply channels by ``factors`` [channels] in the writers' weights and divide in the readers', in place."""
    graph = model.graph
    group.raised = group.raised * factors
    for node in group.writers:
        shape = (-1, *[1] * (_weight(node).ndim - 1))
        _replace(graph, node, 1, _weight(node) * factors.reshape(shape))
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is not None:
            _replace(graph, node, 2, bias * factors)
    for node in group.readers:
        weight = _weight(node)
        if node.op_type != "Conv":
            by = factors[None, :] if node.attributes.get_int("transB", 0) else factors[:, None]
            _replace(graph, node, 1, weight / by)
            continue
        groups = node.attributes.get_int("group", 1)
        # Every output of a group reads the same channels.
        by = np.repeat(factors.reshape(groups, 1, -1), weight.shape[0] // groups, axis=1)
        _replace(graph, node, 1, weight / by.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2)))


def _replace(graph: ir.Graph, node: ir.Node, index: int, array: np.ndarray) -> None:
    """Store other values for an input under the same name.

    Args:
        graph: The graph.
        node: The node.
        index: Index of the input.
        array: The new values.
    """
    old = node.inputs[index]
    assert old is not None, "what is replaced is stored"
    name = str(old.name)
    graph.initializers.pop(name, None)
    node.replace_input_with(index, add_initializer(graph, name, array.astype(np.float32)))
