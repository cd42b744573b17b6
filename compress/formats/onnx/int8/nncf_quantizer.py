"""NNCF's post-training quantization (ranges, SmoothQuant, bias correction) as a graph that ONNX Runtime really fuses.

NNCF's own file keeps the embedding table as integers that are dequantized whole in each call, and quantizes around
operators that the processor computes in float. Its scales and integers are kept; what no kernel takes up is taken
out, and products and attention are written as integer operators.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from compress.errors import DataError, StageError
from compress.formats.onnx.int8.byte_products import cut_saturating
from compress.formats.onnx.int8.choose import QuantizableLayer, find_layers, name_nodes, refuse_unfit
from compress.formats.onnx.int8.kernels import make_unsigned, pack_attention, unpack_attention, write_products
from compress.formats.onnx.int8.observe import Feed
from compress.formats.onnx.int8.redundant_qdq import drop_redundant_qdq, protect_float_layers
from compress.formats.onnx.int8.settings import Format, ReduceRange
from compress.formats.silence import silence


@dataclass
class NncfQuantizer:
    """Quantizes one graph with NNCF, as often as wanted.

    ``layers`` are what can be 8-bit; ``readable`` is the graph as NNCF is given it, attention unpacked.
    """

    graph: onnx.ModelProto
    feeds: Sequence[Feed]
    format: Format = "qoperator"
    reduce_range: ReduceRange = False
    narrowed: list[str] = field(init=False, default_factory=list)
    layers: list[QuantizableLayer] = field(init=False)
    readable: onnx.ModelProto = field(init=False)

    def __post_init__(self) -> None:
        """Unpack. Raises `StageError` for a graph that can't be quantized, `DataError` without a feed."""
        model = ir.from_proto(self.graph)
        refuse_unfit(model)
        name_nodes(model)
        if not self.feeds:
            raise DataError("There is nothing to calibrate with.", expected="at least one example in the train split")
        self._attentions = unpack_attention(model)
        self.layers = find_layers(model)
        for node in model.graph:
            for value in node.outputs:
                value.shape = None
        self.readable = ir.to_proto(model)

    def quantize(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        """The 8-bit graph, the layers named in ``kept`` left in float."""
        attention = len(self._attentions) > 0
        made = ir.from_proto(run_nncf(self.readable, self.feeds, attention, kept, self.reduce_range is not False))
        drop_redundant_qdq(made)
        protect_float_layers(made)
        make_unsigned(made)
        if self.format == "qoperator":
            write_products(made)
        pack_attention(made, self._attentions)
        made.producer_name, made.producer_version = self.graph.producer_name, ""
        graph = ir.to_proto(made)
        if self.reduce_range == "saturating":
            self.narrowed = cut_saturating(graph)
        del graph.graph.value_info[:]
        return graph


def run_nncf(
    graph: onnx.ModelProto, feeds: Sequence[Feed], transformer: bool, kept: Collection[str] = (), narrow: bool = False
) -> onnx.ModelProto:
    """NNCF's own default, telling nobody, or with 7-bit weights if ``narrow``. Raises `StageError` with its words."""
    names = {value.name for value in graph.graph.input}
    given = [{name: array for name, array in feed.items() if name in names} for feed in feeds]
    source = onnx.ModelProto()
    source.CopyFrom(graph)
    with silence("prints"):
        import nncf

        try:
            quantized: onnx.ModelProto = nncf.quantize(
                source,
                nncf.Dataset(given),
                subset_size=len(given),
                model_type=nncf.ModelType.TRANSFORMER if transformer else None,
                advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE)
                if narrow
                else None,
                ignored_scope=nncf.IgnoredScope(names=sorted(kept), validate=False) if kept else None,
            )
        except (nncf.InternalError, nncf.UnsupportedModelError, nncf.ValidationError) as error:
            raise StageError(f"NNCF cannot quantize the graph: {error}", mend="set statistics: own") from error
    return quantized
