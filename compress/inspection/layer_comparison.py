"""Where a file departs from its reference: each part is held against what the reference makes of the same values.

The reference is cut at the values that both have, and given the file's, so that no part's error is told again by the
parts behind it. A part's error is the root mean square of the differences over the spread of the value there. It
departs where that is more than what the bits explain: what the reference itself makes of the same values when it is
rounded as coarsely as the file is in that part.
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
from compress.formats.onnx.intermediate_values import OnnxParts
from compress.formats.parts import LARGEST, Parts, Run, Values
from compress.formats.registry import RUNTIMES, part_of
from compress.formats.target_profile import Target
from compress.numerics.block_quantization import on_coarse_grid
from compress.utils.progress import Progress

NOISE = 1e-4
"""Error of a float part up to which only the order of its sums differs, or how it computes an exponential."""
FACTOR = 4.0
"""How many times what the bits explain a part may err: a file's ranges are not those of the batch at hand."""
_PARAMETER = re.compile(r"\.(weight|bias)\b")


def gives_values(target: Target) -> bool:
    """Whether `open_parts` looks into files there."""
    runtime = RUNTIMES[target.runtime]
    return runtime.gives_values and runtime.provider == target.provider


def open_parts(artifact: Path, target: Target, length: int | None = None) -> Parts:
    """The one file of ``artifact``, as ``target`` runs it. Raises `ModelError` for one that can't be opened.

    ``length`` tokens are the most that it will be given, which some formats have to know.
    """
    parts: Parts = part_of(format_of(artifact), "parts")(model_file(artifact), target, length)
    return parts


@dataclass
class Gap:
    """Squared differences of a value over all batches, and its own spread."""

    squares: float = 0.0
    total: float = 0.0
    whole: float = 0.0
    count: int = 0

    def add(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Count one batch; a difference that is no number counts as infinite."""
        ours, theirs = expected.astype(np.float64), found.astype(np.float64)
        squares = float(np.square(ours - theirs).sum()) if ours.shape == theirs.shape else float("inf")
        self.squares += squares if np.isfinite(squares) else float("inf")
        self.total += float(ours.sum())
        self.whole += float(np.square(ours).sum())
        self.count += ours.size

    @property
    def error(self) -> float:
        """Root mean square of the differences over the value's standard deviation, or its size where it has none."""
        spread = self.whole - self.total**2 / max(self.count, 1)
        span = spread if spread > 1e-9 * self.whole else self.whole
        if self.squares == 0:
            return 0.0
        return float(np.sqrt(self.squares / span)) if span else float("inf")


@dataclass(frozen=True)
class Departure:
    """A part that errs more than its bits explain; all errors are shares of the spread of the value there.

    ``error`` is the part's own, on the values that it is given, ``explained`` what its ``bits`` explain. Beside the
    reference as it runs, the largest error of what the part reads is ``before``, that of what it makes ``after``.
    ``alone`` is the error of the answers if only this part errs. ``weights`` is the reference's node with them.
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
    """A file beside its reference. ``answers`` is the error of the answers, ``worst`` the least excusable part."""

    parts: int
    examples: int
    answers: float
    worst: Departure
    departures: tuple[Departure, ...] = field(default=())


def compare_parts(
    reference: onnx.ModelProto,
    layers: Mapping[str, str],
    candidate: Parts,
    batches: Sequence[Values],
    progress: Progress,
) -> FormatComparison | None:
    """``candidate`` beside ``reference``, a graph of floats, on ``batches``; None where they share no value by name.

    ``layers`` has the layer of each node of ``reference`` by its name.
    """
    float_parts = OnnxParts(reference)
    shared = [name for name in float_parts.computed if name in candidate.steps]
    if not shared:
        return None
    whole, running = float_parts.whole(shared), candidate.whole(shared)
    ours, theirs = whole(batches[0]), running(batches[0])
    names = [name for name in shared if _comparable(ours[name], theirs[name])]
    if not names:
        return None
    comparing = _Comparing(float_parts, candidate, layers, names, whole, running)
    for batch in progress.track(batches, "compare the values of both", len(batches)):
        comparing.add(batch)
    judged = [comparing.judged(name) for name in names]
    bad = [one for one in judged if one.error > max(NOISE, FACTOR * one.explained)]
    told = [replace(one, alone=comparing.alone(one, batches)) for one in bad]
    worst = max(told or judged, key=lambda one: one.error / max(NOISE, one.explained))
    answers = comparing.running_gap[comparing.answer].error
    return FormatComparison(len(names), len(batches), answers, worst, tuple(told))


def _comparable(ours: np.ndarray, theirs: np.ndarray) -> bool:
    """Floats of one shape in both, and no mask."""
    if ours.dtype.kind != "f" or theirs.dtype.kind != "f" or ours.shape != theirs.shape or not ours.size:
        return False
    return bool(np.abs(ours).max() < LARGEST) and bool(ours.any())


class _Comparing:
    """By value: the part's own error, what rounding does to it, and the error in the file as it runs."""

    def __init__(
        self,
        reference: OnnxParts,
        candidate: Parts,
        layers: Mapping[str, str],
        names: Sequence[str],
        whole: Run,
        running: Run,
    ) -> None:
        """``names`` are the values to cut at, ``whole`` gives them in the reference, ``running`` in the candidate."""
        self.reference, self.candidate, self.layers, self.names = reference, candidate, layers, names
        self.whole, self.running, self.parts = whole, running, reference.apart(names, names)
        self.answer = reference.outputs[0] if reference.outputs[0] in names else names[-1]
        self.nodes, self.bits = reference.nodes(names), candidate.bits(names)
        self.coarse = min(8 if fewest < 16 else fewest for fewest in self.bits.values())
        self.rounded = OnnxParts(_rounded(reference, self.bits)).apart(names, names)
        self.own_gap, self.rounded_gap, self.running_gap = (defaultdict[str, Gap](Gap) for _ in range(3))

    def add(self, batch: Values) -> None:
        """Count what one batch shows."""
        values, found = self.whole(batch), self.running(batch)
        coarser = self.rounded({**batch, **{name: on_coarse_grid(found[name], self.coarse) for name in self.names}})
        expected = self.parts({**batch, **found})
        for name in self.names:
            self.own_gap[name].add(expected[name], found[name])
            self.rounded_gap[name].add(expected[name], on_coarse_grid(coarser[name], self.coarse))
            self.running_gap[name].add(values[name], found[name])

    def judged(self, name: str) -> Departure:
        """The part that makes a value."""
        nodes, maker, bits = self.nodes[name], self.candidate.steps[name], self.bits[name]
        reads = [read for node in nodes for read in node.input]
        stored = {one.name for one in self.reference.graph.graph.initializer if len(one.dims) > 1}
        return Departure(
            value=name,
            operator=maker.operator,
            name=maker.name,
            layer=_layer(self.layers.get(nodes[0].name, ""), nodes[0].op_type),
            bits=bits,
            error=self.own_gap[name].error,
            explained=self.rounded_gap[name].error if bits < 32 else 0.0,
            before=max((self.running_gap[read].error for read in reads if read in self.running_gap), default=0.0),
            after=self.running_gap[name].error,
            weights=next((node.name for node in nodes if stored.intersection(node.input)), ""),
        )

    def alone(self, one: Departure, batches: Sequence[Values]) -> float:
        """The error of the answers where the reference's value is off by what this part adds."""
        if self.answer == one.value:
            return one.error
        patched, gap = self.reference.apart([self.answer], [one.value]), Gap()
        for batch in batches:
            values, found = self.whole(batch), self.running(batch)
            added = found[one.value] - self.parts({**batch, **found})[one.value]
            gap.add(values[self.answer], patched({**batch, one.value: values[one.value] + added})[self.answer])
        return gap.error


def _rounded(reference: OnnxParts, bits: Mapping[str, int]) -> onnx.ModelProto:
    """A copy whose weights have as many bits as the candidate has in the part that reads them."""
    fewest: dict[str, int] = {}
    for name, nodes in reference.nodes(bits).items():
        for read in (read for node in nodes for read in node.input):
            fewest[read] = min(bits[name], fewest.get(read, 32))
    changed = onnx.ModelProto()
    changed.CopyFrom(reference.graph)
    for stored in changed.graph.initializer:
        if len(stored.dims) > 1 and stored.data_type == onnx.TensorProto.FLOAT and fewest.get(stored.name, 32) < 32:
            array = on_coarse_grid(onnx.numpy_helper.to_array(stored), fewest[stored.name])
            stored.CopyFrom(onnx.numpy_helper.from_array(array, stored.name))
    return changed


def _layer(weight: str, operator: str) -> str:
    """The module path behind a weight's name; an attention fused whole is no part of its own."""
    module = re.sub(r"\.(weight|bias)\b.*$", "", weight) if _PARAMETER.search(weight) else weight.rpartition(".")[0]
    found = re.match(r".*?att(entio)?n\b", module) if "Attention" in operator else None
    return found[0] if found else module
