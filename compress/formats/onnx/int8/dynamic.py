"""Dynamic INT8 of a graph, all of it or all but some layers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from compress.formats.onnx.int8.byte_products import keep_from_saturating
from compress.formats.onnx.int8.choose import WEIGHTED, QuantizableLayer, find_layers, refuse_unfit
from compress.formats.onnx.int8.settings import ReduceRange
from compress.formats.onnx.int8.unpack import unpack_attention
from compress.formats.onnx.quantization import quantize_products


@dataclass
class DynamicQuantizer:
    """A graph, ready to be quantized again and again; ``layers`` are what can be 8-bit, and smaller ones stay float."""

    graph: onnx.ModelProto
    per_channel: bool = True
    reduce_range: ReduceRange = False
    narrowed: list[str] = field(init=False, default_factory=list)
    layers: list[QuantizableLayer] = field(init=False)

    def __post_init__(self) -> None:
        """Raises `StageError` for a graph that is quantized already or holds nothing to quantize."""
        model = ir.from_proto(self.graph)
        refuse_unfit(model)
        unpack_attention(model)
        self.layers = find_layers(model)
        names = {layer.name for layer in self.layers}
        self._small = [str(node.name) for node in model.graph if node.op_type in WEIGHTED and node.name not in names]

    def quantize(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        """The 8-bit graph, the layers named in ``kept`` left in float."""
        graph = quantize_products(self.graph, self.per_channel, self.reduce_range is True, [*kept, *self._small])
        self.narrowed = keep_from_saturating(graph, self.graph) if self.reduce_range == "saturating" else []
        return graph
