"""Static INT8 of a graph, of all or some layers, from one calibration: our own, or NNCF's.

NNCF's file stores the embedding table as integers that are dequantized completely in each call, and quantizes
around operators that the processor computes in float. Its scales and integers are used. Pairs that no kernel uses
are removed, and products and attention become integer operators.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper

from compress.formats.onnx.graph_edits import constant
from compress.formats.onnx.int8.bias_correction import correct_biases, input_products, mean_errors, round_weights
from compress.formats.onnx.int8.byte_products import cut_saturating, keep_from_saturating
from compress.formats.onnx.int8.fuse_integer_ops import (
    UnpackedAttention,
    fuse_products,
    make_unsigned,
    pack_attention,
    unpack_attention,
)
from compress.formats.onnx.int8.observers import Feed, observe
from compress.formats.onnx.int8.qdq_cleanup import drop_redundant_qdq, protect_float_layers, split_concatenations
from compress.formats.onnx.int8.select_nodes import (
    QuantizableLayer,
    find_layers,
    name_nodes,
    refuse_unfit,
    select_bridges,
)
from compress.formats.onnx.int8.settings import Format, Int8Options, ReduceRange
from compress.formats.quiet_output import suppress_output
from compress.numerics.int8_activations import find_range
from compress.utils.errors import DataError, StageError


@dataclass
class StaticQuantizer:
    """A calibrated graph that can be quantized repeatedly.

    ``layers`` can be 8-bit. ``split`` are the convolutions that were split by the parts of a concatenation;
    ``constant`` the activations that were constant on the calibration data; ``narrowed`` the layers whose weights got a
    coarser grid because they might saturate, in the last graph.
    """

    graph: onnx.ModelProto
    feeds: Sequence[Feed]
    options: Int8Options
    layers: list[QuantizableLayer] = field(init=False)
    split: list[str] = field(init=False, default_factory=list)
    constant: list[str] = field(init=False)
    narrowed: list[str] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Unpack attention and observe. Raises `StageError` and `DataError` as those steps do."""
        model = ir.from_proto(self.graph)
        refuse_unfit(model)
        # Ranges, shifts and selections refer to nodes by name.
        name_nodes(model)
        # Attention is unpacked first, so that its product is a layer like others.
        self._attentions = unpack_attention(model)
        if self.options.split_concatenations:
            self.split = split_concatenations(model, self.feeds)
        self.layers = find_layers(model)
        self._passing = select_bridges(model, [layer.name for layer in self.layers])
        self._model, graph = model, ir.to_proto(model)
        observed = observe(graph, self._tensors(model), self.feeds)
        histograms = {name: statistics.histogram for name, statistics in observed.items()}
        method = self.options.calibration_method
        self._ranges = {name: find_range(histogram, method) for name, histogram in histograms.items()}
        self.constant = [name for name, histogram in histograms.items() if histogram.constant]
        feedback = self.options.weight_rounding == "feedback"
        self._products = input_products(graph, self.layers, self.feeds) if feedback else {}
        # The shift of each layer's mean output is that between the graph and the one with all layers rounded.
        self._errors: dict[str, np.ndarray] = {}
        if self.options.bias_correction:
            coarse = self._rounded(graph, [*(layer.name for layer in self.layers), *self._passing])
            self._errors = mean_errors(graph, coarse, self.layers, observed, self.feeds)

    def quantize(self, float_layers: Collection[str] = ()) -> onnx.ModelProto:
        """Return the 8-bit graph in which ``float_layers`` stay float. Inputs and outputs stay."""
        chosen = [layer.name for layer in self.layers if layer.name not in float_layers]
        graph = ir.to_proto(self._model)
        correct_biases(graph, {name: self._errors[name] for name in chosen if name in self._errors})
        quantized = ir.from_proto(self._rounded(graph, [*chosen, *select_bridges(ir.from_proto(graph), chosen)]))
        # The quantizer leads every reader of a quantized value past it, residuals in float too.
        drop_redundant_qdq(quantized)
        protect_float_layers(quantized)
        fuse, narrow = self.options.format == "qoperator", self.options.narrowing() == "saturating"
        finished, narrowed = _finish(quantized, self._attentions, fuse, narrow)
        self.narrowed += narrowed
        return finished

    def _rounded(self, graph: onnx.ModelProto, nodes: Collection[str]) -> onnx.ModelProto:
        """Return ``graph`` with 8-bit ``nodes``, their weights rounded as the settings require."""
        rounded = insert_qdq(graph, nodes, self._ranges, self.options)
        narrow = self.options.narrowing() == "saturating"
        self.narrowed = keep_from_saturating(rounded, graph) if narrow else []
        if self.options.weight_rounding == "feedback":
            chosen = [layer for layer in self.layers if layer.name in set(nodes)]
            round_weights(rounded, self._model, chosen, self._products)
            if narrow:
                cut_saturating(rounded)
        return rounded

    def _tensors(self, model: ir.Model) -> dict[str, int]:
        """Return all tensors that need a range with the axis of their channels."""
        nodes = {str(node.name): node for node in model.graph}
        axes = {str(nodes[layer.name].inputs[0].name): layer.channel_axis for layer in self.layers}
        # Convolutions and the nodes between them have 8-bit outputs, which need a range too.
        writers = [layer.name for layer in self.layers if layer.operator.startswith("Conv")] + self._passing
        for name in writers:
            for value in (*nodes[name].inputs, *nodes[name].outputs):
                if value is not None and constant(value) is None and value.dtype in (None, ir.DataType.FLOAT):
                    axes.setdefault(str(value.name), 1)
        return axes


def _finish(
    quantized: ir.Model, attentions: Collection[UnpackedAttention], fuse: bool, narrow: bool
) -> tuple[onnx.ModelProto, list[str]]:
    """Return the quantized graph with packed attention, and the layers whose weights were cut.

    ``fuse``: products become integer operators. ``narrow``: weights that may saturate are cut.
    """
    if fuse:
        fuse_products(quantized)
    pack_attention(quantized, attentions)
    graph = ir.to_proto(quantized)
    # Signed activations are unsigned by now.
    narrowed = cut_saturating(graph) if narrow else []
    # What was recorded of values in between is no longer so; the runtime infers it.
    del graph.graph.value_info[:]
    return graph, narrowed


_FLOAT_OUTPUT = ("MatMul", "Gemm")
"""Operators with float outputs, because bias, GELU, normalisation and softmax after them are computed in float."""
_KNOWN = ("onnx.infer", "onnxruntime.quant")
"""Metadata that stops the quantizer from shape inference, which fused operators' recorded shapes contradict."""

Range = tuple[float, float]


def insert_qdq(
    graph: onnx.ModelProto, nodes: Collection[str], ranges: Mapping[str, Range], options: Int8Options
) -> onnx.ModelProto:
    """Return a copy of ``graph`` in which some nodes read 8-bit values, by ONNX Runtime's quantizer.

    Args:
        graph: The float graph.
        nodes: Names of the nodes.
        ranges: Lowest and highest value of each float tensor that they read, and of those that convolutions and the
            nodes between them write.
        options: Settings of the quantization.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.calibrate import TensorData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    source = deepcopy(graph)
    del source.graph.value_info[:]
    # The quantizer needs the type of every tensor with a range.
    source.graph.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ranges)
    source.metadata_props.add(key=_KNOWN[0], value=_KNOWN[1])
    data = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    names = sorted(set(nodes))
    operators = sorted({node.op_type for node in source.graph.node if node.name in names})
    extra = {"WeightSymmetric": True, "OpTypesToExcludeOutputQuantization": list(_FLOAT_OUTPUT)}
    activations, weights = QuantType.QUInt8, QuantType.QInt8
    narrow = options.narrowing() is True
    with suppress_output("logs"):
        quantizer = QDQQuantizer(
            source, options.per_channel, narrow, weights, activations, data, names, [], operators, extra
        )
        quantized: onnx.ModelProto = quantizer.quantize_model()
    # The model keeps its producer and metadata.
    quantized.producer_name, quantized.producer_version = graph.producer_name, ""
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(graph.metadata_props)
    del quantized.graph.value_info[:]
    return quantized


@dataclass
class NncfQuantizer:
    """A graph that NNCF can quantize repeatedly.

    ``layers`` can be 8-bit; ``readable`` is the graph that NNCF gets, with unpacked attention.
    """

    graph: onnx.ModelProto
    feeds: Sequence[Feed]
    format: Format = "qoperator"
    reduce_range: ReduceRange = False
    narrowed: list[str] = field(init=False, default_factory=list)
    layers: list[QuantizableLayer] = field(init=False)
    readable: onnx.ModelProto = field(init=False)

    def __post_init__(self) -> None:
        """Unpack attention. Raises `StageError` for an unsuitable graph, `DataError` without a feed."""
        model = ir.from_proto(self.graph)
        refuse_unfit(model)
        name_nodes(model)
        if not self.feeds:
            raise DataError("There is no calibration data.", expected="at least one example in the train split")
        self._attentions = unpack_attention(model)
        self.layers = find_layers(model)
        # NNCF infers shapes itself; recorded ones of fused operators contradict them.
        for node in model.graph:
            for value in node.outputs:
                value.shape = None
        self.readable = ir.to_proto(model)

    def quantize(self, float_layers: Collection[str] = ()) -> onnx.ModelProto:
        """Return the 8-bit graph in which ``float_layers`` stay float."""
        narrow, attention = self.reduce_range is not False, len(self._attentions) > 0
        quantized = ir.from_proto(run_nncf(self.readable, self.feeds, attention, float_layers, narrow))
        drop_redundant_qdq(quantized)
        protect_float_layers(quantized)
        # NNCF's activations are signed.
        make_unsigned(quantized)
        quantized.producer_name, quantized.producer_version = self.graph.producer_name, ""
        fuse, cut = self.format == "qoperator", self.reduce_range == "saturating"
        graph, self.narrowed = _finish(quantized, self._attentions, fuse, cut)
        return graph


def run_nncf(
    graph: onnx.ModelProto,
    feeds: Sequence[Feed],
    transformer: bool,
    float_layers: Collection[str] = (),
    narrow: bool = False,
) -> onnx.ModelProto:
    """Quantize a graph with NNCF's defaults and without its telemetry.

    Args:
        graph: The float graph.
        feeds: Calibration data.
        transformer: Whether the model is a transformer.
        float_layers: Names of nodes that stay float.
        narrow: Whether weights have 7 bits.

    Raises:
        StageError: NNCF fails.
    """
    names = {value.name for value in graph.graph.input}
    batches = [{name: array for name, array in feed.items() if name in names} for feed in feeds]
    with suppress_output("prints"):
        # NNCF prints on import.
        import nncf

        seven_bits = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
        try:
            quantized: onnx.ModelProto = nncf.quantize(
                deepcopy(graph),
                nncf.Dataset(batches),
                subset_size=len(batches),
                model_type=nncf.ModelType.TRANSFORMER if transformer else None,
                advanced_parameters=seven_bits if narrow else None,
                ignored_scope=nncf.IgnoredScope(names=sorted(float_layers), validate=False) if float_layers else None,
            )
        except (nncf.InternalError, nncf.UnsupportedModelError, nncf.ValidationError) as error:
            raise StageError(f"NNCF cannot quantize the graph: {error}", hint="set statistics: own") from error
    return quantized
