"""INT8 with a floor on the metric: the layers that do most damage go back to float, as few as it takes.

Damage is measured, one layer at a time: that layer alone is 8-bit, and the change of the model's outputs on a few
examples is taken, which needs no labels and far fewer examples than a metric does. Then the metric is
evaluated on the validation split with the 1, 2, 4 worst layers in float, and by halves in what is left; or, under a
ceiling, how far the outputs are from the float graph's on the same examples.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx

from compress.formats.onnx.int8.observers import Feed, open_session
from compress.formats.onnx.int8.select_nodes import QuantizableLayer
from compress.numerics.output_agreement import output_agreement
from compress.tasks.task import Examples, Task
from compress.tasks.tokens import by_length, keep_all
from compress.utils.errors import StageError
from compress.utils.progress import Progress

Merit = Callable[[onnx.ModelProto], float]
_EVALUATED_AT_ONCE = 32
_RANKED_ON = 4
"""Calls that tell which layer does more damage than another, where many more tell how much all of them do."""
COLUMNS = ("Layer", "Operator", "Damage", "Bytes saved by INT8", "Now")
_NOTED_SHARE = 0.25
"""Share of the bytes that INT8 could save, above which float layers get a note."""
_FLOAT, _INT8 = "kept in float", "int8"


class Quantizer(Protocol):
    """Factory of 8-bit graphs of one float graph."""

    layers: list[QuantizableLayer]

    def quantize(self, kept: Collection[str] = ()) -> onnx.ModelProto:
        """Return the graph with all layers quantized except those named."""


@dataclass(frozen=True)
class Damage:
    """Effect of quantizing one layer: ``error`` is the squared change of the outputs over their variance."""

    layer: QuantizableLayer
    error: float

    @property
    def saved_bytes(self) -> int:
        """Return the bytes that 8-bit weights save in place of 32-bit ones."""
        return 3 * self.layer.elements


@dataclass(frozen=True)
class FallbackSearch:
    """Result of the search: the ``kept`` layers stay float after so many ``evaluations`` of the metric."""

    graph: onnx.ModelProto
    damages: tuple[Damage, ...]
    kept: tuple[str, ...]
    floor: float
    merit: float
    float_merit: float
    evaluations: int
    by_error: bool = False
    """Whether the merit is 1 less the error of the outputs."""

    def rows(self) -> list[tuple[str, str, float, int, str]]:
        """Each layer's damage and gain under `COLUMNS`, the worst first."""
        return [
            (layer.name, layer.operator, damage.error, damage.saved_bytes, _FLOAT if layer.name in self.kept else _INT8)
            for damage, layer in ((damage, damage.layer) for damage in self.damages)
        ]

    def verdict(self) -> str:
        """Return the decision in one line."""
        metric = f"metric {self.merit:.4f} on validation (float {self.float_merit:.4f}, floor {self.floor:.4f})"
        error = f"RMS error {1 - self.merit:.4f} on training examples (at most {1 - self.floor:.4f})"
        # The layers are judged one by one only if the model with all of them in INT8 fails.
        kept = f"{len(self.kept)} of {len(self.damages)} layers" if self.damages else "no layer"
        return f"{error if self.by_error else metric} with {kept} in float, {self.evaluations} evaluations"

    def size_note(self) -> str | None:
        """Return which float layer costs the most bytes and which field would quantize it; None for a small share."""
        total = sum(damage.saved_bytes for damage in self.damages)
        kept = [damage for damage in self.damages if damage.layer.name in self.kept]
        lost = sum(damage.saved_bytes for damage in kept)
        if not kept or lost < _NOTED_SHARE * total:
            return None
        largest = max(kept, key=lambda damage: damage.saved_bytes)
        field = "a higher error_ceiling" if self.by_error else "a lower accuracy_floor"
        return (
            f"float layers hold {lost / total:.0%} of the weights, {largest.layer.name} alone "
            f"{largest.saved_bytes / total:.0%}; {field} quantizes more of them and makes the file smaller"
        )


def search(
    graph: onnx.ModelProto,
    quantizer: Quantizer,
    merit: Merit,
    share: float,
    feeds: Sequence[Feed],
    progress: Progress,
    left: Sequence[str] = (),
    by_error: bool = False,
) -> FallbackSearch:
    """Find the 8-bit graph with the fewest float layers whose merit is ``share`` of the float graph's or better.

    The layers ``left`` are float in any case; ``by_error`` says that the merit is `agreement_with`. Damage is measured
    on ``feeds``, by error on the first of them. Raises `StageError` where not even one 8-bit layer can stay.
    """
    float_merit = merit(graph)
    floor = share * float_merit
    judged: dict[int, tuple[onnx.ModelProto, float]] = {}
    damages: list[Damage] = []

    def holds(count: int) -> bool:
        if count not in judged:
            candidate = quantizer.quantize([*left, *(damage.layer.name for damage in damages[:count])])
            judged[count] = candidate, merit(candidate)
        return judged[count][1] >= floor

    if not holds(0):
        few = [feeds[index] for index in range(min(len(feeds), _RANKED_ON))] if by_error else feeds
        damages = rank(graph, quantizer, few, progress, left)
    count = fewest(len(damages), holds)
    if damages and count == len(damages):
        metric = f"metric at {share:.1%} of the float model's {float_merit:.4f}"
        raise StageError(
            f"No 8-bit layer keeps the {f'error at {1 - share:.1%}' if by_error else metric}.",
            expected="a bound that some layers can hold",
            hint=f"{'raise error_ceiling' if by_error else 'lower accuracy_floor'}, give more calibration_examples, or "
            "try another calibration_method",
        )
    best, achieved = judged[count]
    float_layers = tuple(damage.layer.name for damage in damages[:count])
    return FallbackSearch(best, tuple(damages), float_layers, floor, achieved, float_merit, len(judged), by_error)


def rank(
    graph: onnx.ModelProto, quantizer: Quantizer, feeds: Sequence[Feed], progress: Progress, left: Sequence[str] = ()
) -> list[Damage]:
    """Return the damage that quantizing each layer alone causes, the largest first.

    Args:
        graph: Float graph.
        quantizer: Quantizes all layers except the named ones.
        feeds: Inputs on which outputs are compared.
        progress: Receives steps.
        left: Layers that stay float and are not measured.
    """
    expected = _outputs(graph, feeds)
    spread = sum(float(np.square(array - array.mean(axis=0)).sum()) for array in expected)
    layers = [layer for layer in quantizer.layers if layer.name not in left]
    damages_by_layer = []
    for layer in progress.track(layers, "measuring the error of each layer", len(layers)):
        alone = quantizer.quantize([other.name for other in quantizer.layers if other is not layer])
        pairs = zip(_outputs(alone, feeds), expected, strict=True)
        error = sum(float(np.square(array - exact).sum()) for array, exact in pairs)
        damages_by_layer.append(Damage(layer, error / max(spread, np.finfo(float).tiny)))
    return sorted(damages_by_layer, key=lambda damage: -damage.error)


def _outputs(graph: onnx.ModelProto, feeds: Sequence[Feed]) -> list[np.ndarray]:
    """Return all float outputs of all feeds, each as [rows, values]."""
    session = open_session(graph)
    names = {entry.name for entry in session.get_inputs()}
    columns: dict[int, list[np.ndarray]] = {}
    for feed in feeds:
        values = session.run(None, {name: array for name, array in feed.items() if name in names})
        for index, array in enumerate(values):
            if array.dtype.kind == "f":
                whole = np.atleast_1d(array)
                columns.setdefault(index, []).append(whole.reshape(-1, whole.shape[-1]))
    return [np.concatenate(parts).astype(np.float64) for parts in columns.values()]


def agreement_with(graph: onnx.ModelProto, feeds: Sequence[Feed]) -> Merit:
    """1 less the RMS difference of the worst output from that of ``graph`` on ``feeds``, over its spread."""
    expected = _outputs(graph, feeds)

    def agreement(other: onnx.ModelProto) -> float:
        pairs = zip(expected, _outputs(other, feeds), strict=True)
        errors = [output_agreement(reference.reshape(1, -1), answer.reshape(1, -1)).rms for reference, answer in pairs]
        return 1 - max(errors, default=0.0)

    return agreement


def merit_of(task: Task, examples: Examples) -> Merit:
    """Return a function that computes the task's first metric on ``examples``, batched by length as in evaluation."""

    def merit(graph: onnx.ModelProto) -> float:
        session = open_session(graph)
        names = {entry.name for entry in session.get_inputs()}
        outputs = [entry.name for entry in session.get_outputs()]

        def answered(places: list[int]) -> dict[str, np.ndarray]:
            batch = {name: array for name, array in examples.batch(places).items() if name in names}
            return dict(zip(outputs, session.run(None, batch), strict=True))

        collected = keep_all(task, examples, by_length(examples, _EVALUATED_AT_ONCE), answered)
        return task.measure(collected, examples.labels, "validation", "onnxruntime")[0].value

    return merit


def fewest(count: int, holds: Callable[[int], bool]) -> int:
    """Return the least k in 0..``count`` for which ``holds(k)``, which is monotonic and true for ``count``.

    Asks of 1, 2, 4 and so on first, since a few are enough most often, and bisects what is left: at most
    2 + 2 log2(k) questions.
    """
    if count == 0 or holds(0):
        return 0
    fails, good = 0, count
    while good - fails > 1:
        middle = (fails + good) // 2
        if good == count:
            middle = min(middle, max(2 * fails, 1))
        if holds(middle):
            good = middle
        else:
            fails = middle
    return good
