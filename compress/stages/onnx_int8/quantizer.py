"""From a float graph to an 8-bit one, as the options say: which quantizer, which examples, whether a floor holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Protocol

import numpy as np
import onnx
import onnx_ir as ir

from compress.formats.onnx.int8.byte_products import keep_from_saturating
from compress.formats.onnx.int8.dynamic import DynamicQuantizer, quantize_products, quantize_recurrent
from compress.formats.onnx.int8.observers import Feed
from compress.formats.onnx.int8.select_nodes import QuantizableLayer, has_layers
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import NncfQuantizer, StaticQuantizer
from compress.formats.onnx.model import OnnxModel
from compress.models.processor import labels_of, processor_of
from compress.numerics.sampling import spread_sample
from compress.stages.base import Context
from compress.stages.onnx_int8.accuracy_aware import COLUMNS, Merit, agreement_with, merit_of, search
from compress.tasks.task import Examples
from compress.utils.errors import DataError, StageError

MadeQuantizer = DynamicQuantizer | StaticQuantizer | NncfQuantizer
_VALIDATION = "validation"
LAYERS = "compress.int8_layers"
"""The key, among a graph's metadata, of each layer's damage and what was kept in float."""


class ChosenInputs(Protocol):
    """Real inputs of a graph that were chosen to calibrate on; as text, what a reader must know of them."""

    @property
    def feeds(self) -> Sequence[Feed]:
        """Return the inputs of each call."""

    def record(self, graph: onnx.ModelProto) -> None:
        """Write into ``graph``, in place, what it was calibrated on."""


class CalibrationInputs(Protocol):
    """Source of a graph's real inputs, and of the metric for its accuracy floor."""

    def choose(self, count: int) -> ChosenInputs:
        """Return the inputs of ``count`` training examples. Raises `DataError` for an empty split."""

    def merit(self) -> Merit:
        """Return the metric of a graph on the validation split. Raises `DataError` for an empty one."""


def quantize_int8(
    model: OnnxModel, options: Int8Options, context: Context, inputs: CalibrationInputs | None = None
) -> onnx.ModelProto:
    """Quantize the graph of ``model`` to 8 bits, except tables.

    ``inputs`` are those of the graph, where it isn't given the task's examples as they are. Raises `StageError` and
    `DataError`.
    """
    if not options.keep and not has_layers(ir.from_proto(model.graph)):
        return _with_lstms(model.graph, options, context)
    static, inputs = options.method == "static", inputs or RowInputs(model, context)
    chosen = inputs.choose(options.calibration_examples) if static else None
    quantizer = _quantizer(model, options, chosen)
    left = excluded_layers(quantizer.layers, options.keep) if options.keep else []
    if left:
        context.note(f"onnx_int8: {', '.join(left)} left in float, as set in the recipe")
    if options.searches:
        graph = _search(model.graph, quantizer, left, options, inputs, context)
    else:
        graph = quantizer.quantize(left)
    graph = _with_lstms(graph, options, context)
    if chosen is not None:
        chosen.record(graph)
        context.note(f"onnx_int8: {len(quantizer.layers) - len(left)} layers, calibrated on {chosen}")
    if options.narrowing() == "saturating":
        _say_narrowed(quantizer.narrowed, context)
    if isinstance(quantizer, StaticQuantizer):
        if quantizer.split:
            context.note(f"onnx_int8: {len(quantizer.split)} convolutions split by their concatenated inputs")
        for name in quantizer.constant:
            context.note(f"onnx_int8: {name} was the same in every calibration example; are they too few?")
    return graph


def quantize_dynamically(model: OnnxModel, options: Int8Options, context: Context) -> onnx.ModelProto:
    """Quantize every product of ``model``'s graph to 8 bits, with activation ranges found in each call."""
    narrowing = options.narrowing()
    graph = quantize_products(model.graph, options.per_channel, narrowing is True)
    if narrowing == "saturating":
        _say_narrowed(keep_from_saturating(graph, model.graph), context)
    return _with_lstms(graph, options, context)


def _with_lstms(graph: onnx.ModelProto, options: Int8Options, context: Context) -> onnx.ModelProto:
    quantized_graph, count = quantize_recurrent(graph, options.per_channel, options.narrowing() is not False)
    if count:
        context.note(f"onnx_int8: {count} LSTM at 8 bits, input ranges computed in each call")
    return quantized_graph


def _say_narrowed(layers: Sequence[str], context: Context) -> None:
    count = f"weights of {len(layers)} products" if layers else "no product's weights"
    context.note(
        f"onnx_int8: {count} could saturate on x86 without VNNI; such columns have a coarser grid, so none saturates"
    )


def _quantizer(model: OnnxModel, options: Int8Options, chosen: ChosenInputs | None) -> MadeQuantizer:
    if chosen is None:
        return DynamicQuantizer(model.graph, options.per_channel, options.narrowing())
    if options.statistics == "nncf":
        return NncfQuantizer(model.graph, chosen.feeds, options.format, options.narrowing())
    return StaticQuantizer(model.graph, chosen.feeds, options)


def _search(
    graph: onnx.ModelProto,
    made: MadeQuantizer,
    left: Sequence[str],
    options: Int8Options,
    inputs: CalibrationInputs,
    context: Context,
) -> onnx.ModelProto:
    """Return the graph with the fewest layers in float that keeps the bound, with a record of each layer's damage."""
    feeds = inputs.choose(options.damage_examples).feeds
    ceiling, floor = options.error_ceiling, options.accuracy_floor
    if ceiling is not None:
        merit, share = agreement_with(graph, feeds), 1 - ceiling
    else:
        assert floor is not None, "one of the two"
        merit, share = inputs.merit(), floor
    outcome = search(graph, made, merit, share, feeds, context.progress, left, ceiling is not None)
    context.note(f"onnx_int8: {outcome.verdict()}")
    if size_note := outcome.size_note():
        context.note(f"onnx_int8: {size_note}")
    for name in outcome.kept:
        context.detail(f"onnx_int8: {name} stays in float")
    if outcome.damages:
        context.add_table("error of each layer alone in INT8, and bytes saved by INT8", COLUMNS, outcome.rows())
    rows = [
        {"layer": damage.layer.name, "weight": damage.layer.weight, "damage": damage.error}
        | {"saved_bytes": damage.saved_bytes, "int8": damage.layer.name not in outcome.kept}
        for damage in outcome.damages
    ]
    facts = {"floor": outcome.floor, "metric": outcome.merit, "float_metric": outcome.float_merit}
    counts = {"evaluations": outcome.evaluations, "layers_measured": len(outcome.damages)}
    outcome.graph.metadata_props.add(key=LAYERS, value=json.dumps({**facts, **counts, "layers": rows}))
    return outcome.graph


@dataclass(frozen=True)
class RowInputs:
    """See `CalibrationInputs`: the examples that the task makes of the rows of a split."""

    model: OnnxModel
    context: Context

    def choose(self, count: int) -> CalibrationSet:
        """See `CalibrationInputs.choose`."""
        return calibration_set(self.model, self.context, count)

    def merit(self) -> Merit:
        """See `CalibrationInputs.merit`."""
        return merit_of(self.context.task, validation_examples(self.model, self.context))


def validation_examples(model: OnnxModel, context: Context) -> Examples:
    """Return the examples of the validation split. Raises `DataError` for an empty one."""
    rows = context.data.split(_VALIDATION)
    if len(rows) == 0:
        raise DataError("The validation split is empty, so no floor can be held.", where=f"split {_VALIDATION}")
    return context.task.encode(rows, processor_of(model), labels_of(model), context.max_length)


def excluded_layers(layers: Sequence[QuantizableLayer], patterns: Sequence[str]) -> list[str]:
    """Names of the layers whose own name or whose weight's fits one of ``patterns``.

    Raises `StageError` for a pattern that fits none, and where no layer is left.
    """
    layer_names: set[str] = set()
    for pattern in patterns:
        names = ((layer.name, (layer.name, layer.weight)) for layer in layers)
        fitting = {name for name, both in names if any(fnmatchcase(text, pattern) for text in both)}
        if not fitting:
            weights = [layer.weight for layer in layers]
            near = get_close_matches(pattern, weights, n=3, cutoff=0) or weights[:3]
            raise StageError(
                f"No layer's name or weight fits {pattern!r}.",
                where="quantize, keep",
                expected=f"patterns such as {', '.join(map(repr, near))}",
                hint="`compress inspect` on the export shows the weights' names",
            )
        layer_names |= fitting
    if len(layer_names) == len(layers):
        raise StageError("Every layer would stay in float.", where="quantize, keep", expected="some left to quantize")
    return [layer.name for layer in layers if layer.name in layer_names]


SPLIT = "train"
METADATA = "compress.calibration"
"""The key of the record among a graph's metadata."""


class OneByOne(Sequence[Feed]):
    """Examples as batches of one, made when they are asked for.

    ``lengths`` are those of the last axes that a graph fixes: of a longer recording its first window is taken.
    """

    def __init__(self, examples: Examples, rows: np.ndarray, lengths: Mapping[str, int]) -> None:
        self._examples, self._rows, self._lengths = examples, rows, lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Feed:  # type: ignore[override]
        feed = self._examples.batch([int(self._rows[place])])
        return {name: array[..., : self._lengths.get(name)] for name, array in feed.items()}


@dataclass(frozen=True)
class CalibrationSet:
    """Calibration inputs, one feed for each example without padding; ``rows`` are their indices in the split."""

    feeds: Sequence[Feed]
    rows: np.ndarray
    labels: int
    seed: int

    def __str__(self) -> str:
        kinds = f" of {self.labels} labels" if self.labels else ""
        return f"{len(self.feeds)} examples{kinds}, all lengths, seed {self.seed}"

    def record(self, graph: onnx.ModelProto) -> None:
        """Write into ``graph``, in place, what it was calibrated on."""
        digest = hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest()
        facts = {"split": SPLIT, "examples": len(self.rows), "labels": self.labels, "seed": self.seed}
        graph.metadata_props.add(key=METADATA, value=json.dumps({**facts, "rows_sha256": digest}, sort_keys=True))


def calibration_set(model: OnnxModel, context: Context, count: int) -> CalibrationSet:
    """``count`` training examples (or all) of all labels and lengths alike. Raises `DataError` for an empty split."""
    rows = context.data.split(SPLIT)
    if len(rows) == 0:
        raise DataError("The train split is empty, so there is nothing to calibrate with.", where=f"split {SPLIT}")
    examples = context.task.encode(rows, processor_of(model), labels_of(model), context.max_length)
    classes = examples.classes
    chosen = spread_sample(examples.lengths(), classes, count, context.seed)
    kinds = 0 if classes is None else len(np.unique(classes[chosen]))
    # The last axis of each input that has a fixed length.
    shapes = {value.name: value.type.tensor_type.shape.dim for value in model.graph.graph.input}
    lengths = {name: axes[-1].dim_value for name, axes in shapes.items() if len(axes) > 1 and axes[-1].dim_value}
    return CalibrationSet(OneByOne(examples, chosen, lengths), chosen, kinds, context.seed)
