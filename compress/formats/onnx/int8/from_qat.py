"""Insertion of integer weights and activation grids from quantization-aware training into the exported graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from compress.formats.onnx.graph_edits import add_initializer, clean, constant
from compress.formats.onnx.int8.fuse_integer_ops import quantized_source
from compress.formats.onnx.int8.layer_matching import LayerMatch, end_of, limits_of
from compress.utils.errors import StageError

FOUR_BITS_FROM = 21
"""ONNX operator set from which 4-bit integers exist."""
_LEVELS = 255
_FOUR_BITS, _WIDE = ".weight_Q4", "_wide"
"""Suffixes of packed integers, which `compress.inspection` reads, and of integers before they are packed."""


@dataclass(frozen=True)
class ActivationGrid:
    """Grid of uint8 activations: ``(integer - zero_point) * scale``."""

    scale: np.float32
    zero_point: int


@dataclass(frozen=True)
class IntegerLayer:
    """A layer with integer weights.

    ``integers`` [outputs, inputs, ...] int8 of ``bits`` with ``scales`` [outputs] float32, ``bias`` [outputs] float32.
    Inputs are on ``input_grid``, the outputs of a convolution on ``output_grid``.
    """

    name: str
    bits: int
    integers: np.ndarray
    scales: np.ndarray
    bias: np.ndarray | None
    input_grid: ActivationGrid
    output_grid: ActivationGrid | None = None

    @property
    def weight(self) -> np.ndarray:
        """Float weights that the integers represent [outputs, inputs, ...]."""
        # Scales with axes for broadcasting over weights.
        scales = self.scales.reshape(-1, *[1] * (self.integers.ndim - 1))
        product: np.ndarray = self.integers.astype(np.float32) * scales
        return product

    @property
    def integer_bias(self) -> np.ndarray | None:
        """Bias [outputs] int32 in steps of the sums."""
        return None if self.bias is None else np.rint(self.bias / self.steps).astype(np.int32)

    @property
    def steps(self) -> np.ndarray:
        """Value of 1 in a sum of integers [outputs] float32."""
        steps: np.ndarray = self.input_grid.scale * self.scales
        return steps


def insert_integers(model: ir.Model, places: Sequence[LayerMatch], layers: Mapping[str, IntegerLayer]) -> None:
    """Replace the float weights at ``places`` by the integers of ``layers``, in place.

    Raises `StageError` where layers with joined weights read different grids.
    """
    nodes = {str(node.name): node for node in model.graph}
    writer = _Writer(model.graph)
    for match in places:
        writer.write(nodes[match.node], [layers[name] for name in match.layers])
    clean(model)


def store_in_four_bits(model: onnx.ModelProto) -> None:
    """Store weights that fit in 4 bits as INT4, in place; they are cast to 8 bits once, when the graph is loaded.

    Raises `StageError` for an operator set without 4-bit integers.
    """
    wide_tensors = [tensor for tensor in model.graph.initializer if tensor.name.endswith(_FOUR_BITS + _WIDE)]
    if wide_tensors:
        refuse_four_bits(next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")))
    casts = []
    for tensor in wide_tensors:
        values = numpy_helper.to_array(tensor).reshape(-1).view(np.uint8)
        values = np.append(values, np.zeros(len(values) % 2, np.uint8)) & 15
        # The first of two values is in the low bits of a byte.
        packed, name = (values[::2] | values[1::2] << 4).tobytes(), tensor.name.removesuffix(_WIDE)
        model.graph.initializer.append(helper.make_tensor(name, TensorProto.INT4, tensor.dims, packed, raw=True))
        casts.append(helper.make_node("Cast", [name], [tensor.name], f"{name}_widen", to=TensorProto.INT8))
        model.graph.initializer.remove(tensor)
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def refuse_four_bits(opset: int) -> None:
    """Raise `StageError` for an operator set without 4-bit integers."""
    if opset < FOUR_BITS_FROM:
        raise StageError(
            f"ONNX operator set {opset} has no 4-bit integers.",
            expected=f"{FOUR_BITS_FROM} or newer",
            hint="leave opset out, or set bits: 8",
        )


@dataclass
class _Writer:
    """Writer of quantized layers that shares quantization of equal values."""

    graph: ir.Graph
    made: dict[tuple[int, float, int], ir.Value] = field(default_factory=dict)

    def write(self, node: ir.Node, layers: Sequence[IntegerLayer]) -> None:
        """Quantize ``node``, whose weights join those of ``layers``."""
        first = layers[0]
        if any(layer.input_grid != first.input_grid for layer in layers):
            raise StageError(f"{first.name} and the layers beside it in the graph read different grids.")
        node.replace_input_with(0, self._on_grid(node, node.inputs[0], first.input_grid))
        # Layers whose weights are joined, such as queries, keys and values, are joined along the outputs.
        integers = np.concatenate([layer.integers for layer in layers])
        scales = np.concatenate([layer.scales for layer in layers])
        product = node.op_type != "Conv"
        suffix = _FOUR_BITS + _WIDE if all(layer.bits == 4 for layer in layers) else ".weight_quantized"
        name = layers[0].name if len(layers) == 1 else f"{layers[0].name}+{len(layers) - 1}"
        stored = self._initializer(f"{name}{suffix}", integers.T if product else integers)
        scale = self._initializer(f"{name}.weight_scale", scales)
        # The integers are stored as [inputs, outputs], so the node must not transpose them.
        node.attributes.pop("transB", None)
        self._dequantized(node, 1, stored, scale, 1 if product else 0)
        # Products return floats, so only convolutions have an output grid.
        if node.op_type == "Conv":
            bias = first.integer_bias
            if bias is not None and (len(node.inputs) > 2 or bias.any()):
                if len(node.inputs) < 3:
                    raise StageError(f"The bias of {first.name} is not that of its convolution in the exported graph.")
                stored_bias = self._initializer(f"{first.name}.bias_quantized", bias)
                self._dequantized(node, 2, stored_bias, self._initializer(f"{first.name}.bias_scale", first.steps), 0)
            assert first.output_grid is not None, "a convolution's outputs have a grid"
            # Lead readers of a convolution through the grid, and past a `Relu` or `Clip` that the grid makes redundant.
            grid = first.output_grid
            low, high = limits_of(node)
            # A `Relu` or `Clip` changes nothing if the grid covers no value beyond its bounds.
            within = grid.zero_point == 0 == low and grid.scale * np.float32(_LEVELS) <= high
            end = end_of(node) if within else node.outputs[0]
            uses, is_output = list(end.uses()), end.is_graph_output()
            down, up = self._pair(node.outputs[0], grid)
            self.graph.insert_after(node, [down, up])
            for use in uses:
                use.node.replace_input_with(use.idx, up.outputs[0])
            # A graph output keeps its name.
            if is_output:
                index = list(self.graph.outputs).index(end)
                self.graph.outputs[index] = up.outputs[0]
                end.name, up.outputs[0].name, up.outputs[0].shape = up.outputs[0].name, end.name, end.shape

    def _on_grid(self, node: ir.Node, value: ir.Value | None, grid: ActivationGrid) -> ir.Value:
        """Return ``value`` rounded to the grid before ``node``; itself if it is on the grid already."""
        assert value is not None, "a layer has an input"
        source = quantized_source(value)
        step, zero = (None, None) if source is None else (constant(source.scale), constant(source.zero_point))
        if (
            step is not None
            and zero is not None
            and step.size == 1
            and (step.item(), zero.item()) == (grid.scale, grid.zero_point)
        ):
            return value
        # Layers that read one value with the same grid share the quantization.
        key = (id(value), float(grid.scale), grid.zero_point)
        if key not in self.made:
            pair = self._pair(value, grid)
            self.graph.insert_before(node, pair)
            self.made[key] = pair[1].outputs[0]
        return self.made[key]

    def _pair(self, value: ir.Value, grid: ActivationGrid) -> list[ir.Node]:
        """Return a `QuantizeLinear` and a `DequantizeLinear` of a value."""
        name = f"{value.name}_grid_{len(self.made)}"
        scale = add_initializer(self.graph, f"{name}_scale", np.asarray(grid.scale, np.float32))
        zero = add_initializer(self.graph, f"{name}_zero_point", np.asarray(grid.zero_point, np.uint8))
        down = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}_quantize")
        up = ir.node("DequantizeLinear", [down.outputs[0], scale, zero], name=f"{name}_dequantize")
        down.outputs[0].name, up.outputs[0].name = f"{name}_integers", f"{name}_values"
        down.outputs[0].type, up.outputs[0].type = (ir.TensorType(t) for t in (ir.DataType.UINT8, ir.DataType.FLOAT))
        down.outputs[0].shape = up.outputs[0].shape = value.shape
        return [down, up]

    def _dequantized(self, node: ir.Node, index: int, stored: ir.Value, scale: ir.Value, axis: int) -> None:
        """Connect the input ``index`` of a node to the integers ``stored``, dequantized with scales along ``axis``."""
        name = f"{node.name}_input_{index}"
        up = ir.node("DequantizeLinear", [stored, scale], attributes={"axis": axis}, name=f"{name}_dequantize")
        up.outputs[0].name = name
        up.outputs[0].type, up.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), stored.shape
        self.graph.insert_before(node, up)
        node.replace_input_with(index, up.outputs[0])

    def _initializer(self, name: str, array: np.ndarray) -> ir.Value:
        """Store an array once, for a layer that several nodes use."""
        existing = self.graph.initializers.get(name)
        return existing if existing is not None else add_initializer(self.graph, name, array)
