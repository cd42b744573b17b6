"""Comparison of a file with its reference graph, part by part.

The reference is cut at the values that both have, and given the file's values as inputs, so that the error of a part
does not affect the parts behind it. A part's error is the root mean square of the differences divided by the
standard deviation of the value. It is a departure if it exceeds the error that the number of bits explains: the
error of the reference itself when it is rounded as coarsely as the file is in that part.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from compress.formats.model_file import format_of, model_file
from compress.formats.onnx.intermediate_values import MASK_MAGNITUDE, OnnxParts, Run, Values
from compress.formats.registry import RUNTIMES, part_of
from compress.formats.target_profile import Target
from compress.numerics.block_quantization import on_coarse_grid
from compress.utils.progress import Progress

NOISE = 1e-4
"""Error of a float part that different summation orders or approximations of exponentials explain."""
FACTOR = 4.0
"""Allowed multiple of the explained error: a file's ranges were not calibrated on the batch at hand."""
_PARAMETER = re.compile(r"\.(weight|bias)\b")


def gives_values(target: Target) -> bool:
    """Return True if `open_value_graph` can read intermediate values of files on this target."""
    runtime = RUNTIMES[target.runtime]
    return runtime.gives_values and runtime.provider == target.provider


def open_value_graph(artifact: Path, target: Target) -> OnnxParts:
    """Open the only model file of ``artifact`` as ``target`` runs it. Raises `ModelError` if it cannot be opened."""
    parts: OnnxParts = part_of(format_of(artifact), "value_graph")(model_file(artifact), target)
    return parts


@dataclass
class Gap:
    """Accumulated squared differences of a value, and the statistics of its own spread."""

    squares: float = 0.0
    total: float = 0.0
    whole: float = 0.0
    count: int = 0

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        """Add one batch; a difference that is not finite counts as infinite."""
        ours, theirs = expected.astype(np.float64), actual.astype(np.float64)
        # Values of another shape are infinitely different.
        squares = float(np.square(ours - theirs).sum()) if ours.shape == theirs.shape else float("inf")
        self.squares += squares if np.isfinite(squares) else float("inf")
        self.total += float(ours.sum())
        self.whole += float(np.square(ours).sum())
        self.count += ours.size

    @property
    def error(self) -> float:
        """Return the RMS difference over the value's standard deviation, or over its RMS if it is constant."""
        # Sum of squared deviations from the mean; rounding leaves a tiny rest for constant values.
        spread = self.whole - self.total**2 / max(self.count, 1)
        span = spread if spread > 1e-9 * self.whole else self.whole
        if self.squares == 0:
            return 0.0
        return float(np.sqrt(self.squares / span)) if span else float("inf")


@dataclass(frozen=True)
class Departure:
    """Part with a larger error than its bits explain; errors are relative to the spread of the value.

    ``error`` is the part's own error on its given inputs, ``explained`` the error that its ``bits`` explain. Compared
    with the unmodified reference, ``before`` is the largest error of the part's inputs and ``after`` that of its
    output. ``alone`` is the error of the final output if only this part errs. ``weights`` names the reference node with
    its weights.
    """

    value: str
    operator: str
    name: str
    layer: str
    bits: int
    error: float
    explained: float
    before: float
    after: float
    weights: str = ""
    alone: float | None = None


@dataclass(frozen=True)
class FormatComparison:
    """Result of comparing a file with its reference.

    ``answers`` is the error of the output, ``worst`` the part with the largest excess over its explained error.
    """

    parts: int
    examples: int
    answers: float
    worst: Departure
    departures: tuple[Departure, ...] = field(default=())


def compare_parts(
    reference: onnx.ModelProto,
    layers: Mapping[str, str],
    candidate: OnnxParts,
    batches: Sequence[Values],
    progress: Progress,
) -> FormatComparison | None:
    """Compare ``candidate`` with a float graph on ``batches``; None if they have no value names in common.

    Args:
        reference: Float graph.
        layers: Layer of each node of the reference by name.
        candidate: Parts of the file.
        batches: Inputs.
        progress: Receiver of progress.
    """
    float_parts = OnnxParts(reference)
    shared = [name for name in float_parts.computed if name in candidate.steps]
    if not shared:
        return None
    whole, running = float_parts.whole(shared), candidate.whole(shared)
    ours, theirs = whole(batches[0]), running(batches[0])
    # Masks and integer values carry no information about errors.
    names = [
        name
        for name in shared
        if ours[name].dtype.kind == theirs[name].dtype.kind == "f"
        and ours[name].shape == theirs[name].shape
        and ours[name].any()
        and np.abs(ours[name]).max() < MASK_MAGNITUDE
    ]
    if not names:
        return None
    comparing = _Comparing(float_parts, candidate, layers, names, whole, running)
    for batch in progress.track(batches, "comparing intermediate values", len(batches)):
        comparing.add(batch)
    parts = [comparing.judged(name) for name in names]
    departing = [part for part in parts if part.error > max(NOISE, FACTOR * part.explained)]
    departures = [replace(part, alone=comparing.alone(part, batches)) for part in departing]
    # The worst part has the largest ratio of its error to the explained error.
    worst = max(departures or parts, key=lambda part: part.error / max(NOISE, part.explained))
    answers = comparing.running_gap[comparing.answer].error
    return FormatComparison(len(names), len(batches), answers, worst, tuple(departures))


class _Comparing:
    """Accumulated errors by value: of the part alone, of rounding, and of the file as it runs."""

    def __init__(
        self,
        reference: OnnxParts,
        candidate: OnnxParts,
        layers: Mapping[str, str],
        names: Sequence[str],
        whole: Run,
        running: Run,
    ) -> None:
        """Prepare the comparison.

        Args:
            reference: Parts of the float graph.
            candidate: Parts of the file.
            layers: Layer of each node of the reference by name.
            names: Values to cut at.
            whole: Runs the reference and returns these values.
            running: Runs the candidate and returns these values.
        """
        self.reference, self.candidate, self.layers, self.names = reference, candidate, layers, names
        self.whole, self.running, self.parts = whole, running, reference.apart(names, names)
        self.answer = reference.outputs[0] if reference.outputs[0] in names else names[-1]
        self.nodes, self.bits = reference.nodes(names), candidate.bits(names)
        # Activations are rounded as coarsely as the coarsest part, but not below 8 bits.
        self.coarse = min(8 if bits < 16 else bits for bits in self.bits.values())
        # A copy of the reference whose weights have the candidate's number of bits in the part that reads them.
        fewest: dict[str, int] = {}
        # A weight that several parts read is rounded as in the coarsest of them.
        for name, nodes in reference.nodes(self.bits).items():
            for read in (read for node in nodes for read in node.input):
                fewest[read] = min(self.bits[name], fewest.get(read, 32))
        changed = onnx.ModelProto()
        changed.CopyFrom(reference.graph)
        for stored in changed.graph.initializer:
            if len(stored.dims) > 1 and stored.data_type == onnx.TensorProto.FLOAT and fewest.get(stored.name, 32) < 32:
                array = on_coarse_grid(onnx.numpy_helper.to_array(stored), fewest[stored.name])
                stored.CopyFrom(onnx.numpy_helper.from_array(array, stored.name))
        self.rounded = OnnxParts(changed).apart(names, names)
        self.own_gap, self.rounded_gap, self.running_gap = (defaultdict[str, Gap](Gap) for _ in range(3))

    def add(self, batch: Values) -> None:
        """Accumulate the errors of one batch."""
        values, actual = self.whole(batch), self.running(batch)
        coarser = self.rounded({**batch, **{name: on_coarse_grid(actual[name], self.coarse) for name in self.names}})
        # Each part of the reference gets the file's own inputs, so that errors do not propagate.
        expected = self.parts({**batch, **actual})
        for name in self.names:
            self.own_gap[name].add(expected[name], actual[name])
            self.rounded_gap[name].add(expected[name], on_coarse_grid(coarser[name], self.coarse))
            self.running_gap[name].add(values[name], actual[name])

    def judged(self, name: str) -> Departure:
        """Return the result for the part that computes a value."""
        nodes, step, bits = self.nodes[name], self.candidate.steps[name], self.bits[name]
        reads = [read for node in nodes for read in node.input]
        stored = {tensor.name for tensor in self.reference.graph.graph.initializer if len(tensor.dims) > 1}
        # The module path of a weight; for a fused attention, the whole attention module.
        weight = self.layers.get(nodes[0].name, "")
        module = re.sub(r"\.(weight|bias)\b.*$", "", weight) if _PARAMETER.search(weight) else weight.rpartition(".")[0]
        attention = re.match(r".*?att(entio)?n\b", module) if "Attention" in nodes[0].op_type else None
        return Departure(
            value=name,
            operator=step.operator,
            name=step.name,
            layer=(attention[0] if attention else module),
            bits=bits,
            error=self.own_gap[name].error,
            explained=self.rounded_gap[name].error if bits < 32 else 0.0,
            before=max((self.running_gap[read].error for read in reads if read in self.running_gap), default=0.0),
            after=self.running_gap[name].error,
            weights=next((node.name for node in nodes if stored.intersection(node.input)), ""),
        )

    def alone(self, part: Departure, batches: Sequence[Values]) -> float:
        """Return the error of the output if the reference's value is changed by this part's own error."""
        if self.answer == part.value:
            return part.error
        patched, gap = self.reference.apart([self.answer], [part.value]), Gap()
        for batch in batches:
            values, actual = self.whole(batch), self.running(batch)
            # The part's own error is added to the otherwise exact reference value.
            added = actual[part.value] - self.parts({**batch, **actual})[part.value]
            gap.add(values[self.answer], patched({**batch, part.value: values[part.value] + added})[self.answer])
        return gap.error
