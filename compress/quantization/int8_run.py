"""From a float graph to an 8-bit one, as the options say: which quantizer, which examples, whether a floor holds."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import onnx
import onnx_ir as ir

from compress.checkpoints.processor import labels_of, processor_of
from compress.errors import DataError, StageError
from compress.formats.onnx.int8.byte_products import keep_from_saturating
from compress.formats.onnx.int8.choose import QuantizableLayer, without_kernel
from compress.formats.onnx.int8.nncf_quantizer import NncfQuantizer
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.formats.onnx.model import OnnxModel
from compress.formats.onnx.quantization import DynamicQuantizer, quantize_products
from compress.quantization.int8_calibration import CalibrationSet, calibration_set
from compress.quantization.int8_floor import COLUMNS, Quantizer, Search, merit_of, search

if TYPE_CHECKING:
    import onnx

    from compress.stage.stage import Context


MadeQuantizer = DynamicQuantizer | StaticQuantizer | NncfQuantizer
_VALIDATION = "validation"
LAYERS = "compress.int8_layers"
"""The key, among a graph's metadata, of each layer's damage and what was kept in float."""


def quantize_int8(model: OnnxModel, options: Int8Options, context: Context) -> onnx.ModelProto:
    """The graph of ``model`` at 8 bits, tables left alone. Raises `StageError` and `DataError`."""
    static = options.method == "static"
    chosen = calibration_set(model, context, options.calibration_examples) if static else None
    for operator, count in without_kernel(ir.from_proto(model.graph)).items():
        context.remark(f"quantize: {count} {operator} left in float: ONNX Runtime has no integer kernel for it")
    made = _quantizer(model, options, chosen)
    quantizer: Quantizer = made
    if options.keep:
        names = kept_layers(made.layers, options.keep)
        quantizer = Keeping(made, names)
        context.remark(f"quantize: {', '.join(names)} left in float, as the recipe says")
    if options.accuracy_floor is None:
        graph = quantizer.quantize()
    else:
        found = _search(model, quantizer, options, options.accuracy_floor, context)
        graph = found.graph
        context.remark(f"quantize: {found.verdict()}")
        for name in found.kept:
            context.remark(f"quantize: {name} stays in float")
        if found.damages:
            context.tabulate("damage of each layer alone in INT8, and what INT8 saves", COLUMNS, found.rows())
        _record(found, graph)
    if chosen is not None:
        chosen.record(graph)
        context.remark(f"quantize: {len(quantizer.layers)} layers, calibrated on {chosen}")
    if options.narrowing() == "saturating":
        _say_narrowed(made.narrowed, context)
    if isinstance(made, StaticQuantizer):
        if made.equalized:
            context.remark(f"quantize: channels evened before {len(made.equalized)} layers")
        for name in made.constant:
            context.remark(f"quantize: {name} was the same in every calibration example; are they too few?")
    return graph


def quantize_dynamically(model: OnnxModel, options: Int8Options, context: Context) -> onnx.ModelProto:
    """The graph of ``model`` with every product at 8 bits, ranges of activations found in each call."""
    narrowing = options.narrowing()
    graph = quantize_products(model.graph, options.per_channel, narrowing is True)
    if narrowing == "saturating":
        _say_narrowed(keep_from_saturating(graph, model.graph), context)
    return graph


def _say_narrowed(layers: Sequence[str], context: Context) -> None:
    count = f"weights of {len(layers)} products" if layers else "no product's weights"
    context.remark(
        f"quantize: {count} could saturate on x86 without VNNI; columns that could have a coarser grid, so none does"
    )


def _quantizer(model: OnnxModel, options: Int8Options, chosen: CalibrationSet | None) -> MadeQuantizer:
    if chosen is None:
        return DynamicQuantizer(model.graph, options.per_channel, options.narrowing())
    if options.statistics == "nncf":
        return NncfQuantizer(model.graph, chosen.feeds, options.format, options.narrowing())
    return StaticQuantizer(model.graph, chosen.feeds, options)


def _search(model: OnnxModel, quantizer: Quantizer, options: Int8Options, share: float, context: Context) -> Search:
    rows = context.data.split(_VALIDATION)
    if len(rows) == 0:
        raise DataError("The validation split is empty, so no floor can be held.", where=f"split {_VALIDATION}")
    examples = context.task.encode(rows, processor_of(model), labels_of(model), context.max_length)
    feeds = calibration_set(model, context, options.damage_examples).feeds
    merit = merit_of(context.task, examples)
    return search(model.graph, quantizer, merit, share, feeds, options.search_seconds, context.progress)


def _record(found: Search, graph: onnx.ModelProto) -> None:
    rows = [
        {"layer": damage.layer.name, "weight": damage.layer.weight, "damage": damage.error}
        | {"saved_bytes": damage.saved_bytes, "int8": damage.layer.name not in found.kept}
        for damage in found.damages
    ]
    facts = {"floor": found.floor, "metric": found.merit, "float_metric": found.float_merit}
    counts = {"evaluations": found.evaluations, "layers_measured": found.passes}
    graph.metadata_props.add(key=LAYERS, value=json.dumps({**facts, **counts, "layers": rows}))


class Keeping:
    """A quantizer that leaves the layers of ``names`` in float, whatever else is asked for."""

    def __init__(self, quantizer: Quantizer, names: Collection[str]) -> None:
        self._quantizer, self._names = quantizer, tuple(names)
        self.layers: list[QuantizableLayer] = [layer for layer in quantizer.layers if layer.name not in self._names]

    def quantize(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        """See `Quantizer.quantize`."""
        return self._quantizer.quantize([*self._names, *kept])


def kept_layers(layers: Sequence[QuantizableLayer], patterns: Sequence[str]) -> list[str]:
    """Names of the layers whose own name or whose weight's fits one of ``patterns``.

    Raises `StageError` for a pattern that fits none, and where no layer is left.
    """
    found: set[str] = set()
    for pattern in patterns:
        fitting = {each.name for each in layers if fnmatchcase(each.name, pattern) or fnmatchcase(each.weight, pattern)}
        if not fitting:
            weights = [layer.weight for layer in layers]
            near = get_close_matches(pattern, weights, n=3, cutoff=0) or weights[:3]
            raise StageError(
                f"No layer's name or weight fits {pattern!r}.",
                where="quantize, keep",
                expected=f"patterns such as {', '.join(map(repr, near))}",
                mend="`compress inspect` on the export shows the weights' names",
            )
        found |= fitting
    if len(found) == len(layers):
        raise StageError(
            "Every layer is to be kept in float.", where="quantize, keep", expected="some left to quantize"
        )
    return [layer.name for layer in layers if layer.name in found]
