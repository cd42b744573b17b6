"""Where a file departs from its reference: each part is given the reference's values, and its own error is judged.

A part's error is the root mean square of the differences over the spread of the reference's value there. It departs
where that is more than what the bits explain: what the reference itself makes of the same values when it is rounded as
coarsely as the file is in that part.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from compress.formats.onnx.parts import OnnxParts, part_nodes
from compress.formats.parts import LARGEST, Parts, Run, Values
from compress.numerics.block_quantization import on_coarse_grid
from compress.progress import Progress

NOISE = 1e-4
"""Error of a float part up to which only the order of its sums differs, or how it computes an exponential."""
FACTOR = 4.0
"""How many times what the bits explain a part may err: a file's ranges are not those of the batch at hand."""
_PARAMETER = re.compile(r"\.(weight|bias)\b")


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

    ``error`` is the part's own, given the reference's values, ``explained`` what its ``bits`` explain. In the file as
    it runs, the largest error of what the part reads is ``before``, that of what it makes ``after``. ``alone`` is the
    error of the answers if only this part errs, where that was asked. ``weights`` is the reference's node with them.
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


@dataclass(frozen=True)
class _Runs:
    """What answers a batch: the reference, the candidate as it runs, and its parts given the reference's values."""

    whole: Run
    running: Run
    own: Run


@dataclass(frozen=True)
class _Sums:
    """By value: the part's own error, what rounding does to it, and the error in the file as it runs."""

    own: Mapping[str, Gap]
    rounded: Mapping[str, Gap]
    running: Mapping[str, Gap]


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
    shared = [name for name in float_parts.computed if name in candidate.makers]
    if not shared:
        return None
    whole, running = float_parts.whole(shared), candidate.whole(shared)
    cuts = _cuts(shared, whole(batches[0]), running(batches[0]))
    if not cuts:
        return None
    names = list(cuts)
    bits = candidate.bits(names)
    runs = _Runs(whole, running, candidate.apart(cuts))
    sums = _sum(float_parts, runs, cuts, bits, batches, progress)
    nodes = part_nodes(reference, names)
    answer = float_parts.outputs[0] if float_parts.outputs[0] in cuts else names[-1]
    stored = frozenset(one.name for one in reference.graph.initializer if len(one.dims) > 1)
    judged = [_judged(name, sums, bits[name], nodes[name], candidate, layers, stored) for name in names]
    bad = [one for one in judged if one.error > max(NOISE, FACTOR * one.explained)]
    told = [_alone(one, answer, float_parts, runs, cuts, batches) for one in bad]
    worst = max(told or judged, key=lambda one: one.error / max(NOISE, one.explained))
    return FormatComparison(len(names), len(batches), sums.running[answer].error, worst, tuple(told))


def _cuts(names: Sequence[str], ours: Values, theirs: Values) -> dict[str, np.ndarray]:
    """The values to cut at, as the candidate has them, in the order of ``names``: floats of one shape in both."""
    return {name: theirs[name] for name in names if _comparable(ours[name], theirs[name])}


def _comparable(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if ours.dtype.kind != "f" or theirs.dtype.kind != "f" or ours.shape != theirs.shape or not ours.size:
        return False
    return bool(np.abs(ours).max() < LARGEST) and bool(ours.any())


def _sum(
    reference: OnnxParts,
    runs: _Runs,
    cuts: Mapping[str, np.ndarray],
    bits: Mapping[str, int],
    batches: Sequence[Values],
    progress: Progress,
) -> _Sums:
    names = list(cuts)
    coarse = min(8 if fewest < 16 else fewest for fewest in bits.values())
    rounded = OnnxParts(_rounded(reference.graph, bits)).apart(
        {name: array.astype(np.float32) for name, array in cuts.items()}
    )
    sums = _Sums({name: Gap() for name in names}, {name: Gap() for name in names}, {name: Gap() for name in names})
    for batch in progress.track(batches, "compare the values of both", len(batches)):
        values = runs.whole(batch)
        given = {name: values[name] for name in names}
        found = runs.own({**batch, **given}), rounded({**batch, **_all_rounded(given, coarse)}), runs.running(batch)
        for name, expected in given.items():
            sums.own[name].add(expected, found[0][name])
            sums.rounded[name].add(expected, on_coarse_grid(found[1][name], coarse))
            sums.running[name].add(expected, found[2][name])
    return sums


def _all_rounded(values: Values, bits: int) -> Values:
    return {name: on_coarse_grid(array, bits) for name, array in values.items()}


def _rounded(graph: onnx.ModelProto, bits: Mapping[str, int]) -> onnx.ModelProto:
    """A copy whose weights have as many bits as the candidate has in the part that reads them."""
    fewest: dict[str, int] = {}
    for name, nodes in part_nodes(graph, list(bits)).items():
        for read in (read for node in nodes for read in node.input):
            fewest[read] = min(bits[name], fewest.get(read, 32))
    changed = onnx.ModelProto()
    changed.CopyFrom(graph)
    for stored in changed.graph.initializer:
        if len(stored.dims) > 1 and stored.data_type == onnx.TensorProto.FLOAT and fewest.get(stored.name, 32) < 32:
            array = on_coarse_grid(onnx.numpy_helper.to_array(stored), fewest[stored.name])
            stored.CopyFrom(onnx.numpy_helper.from_array(array, stored.name))
    return changed


def _judged(
    name: str,
    sums: _Sums,
    bits: int,
    nodes: Sequence[onnx.NodeProto],
    candidate: Parts,
    layers: Mapping[str, str],
    stored: frozenset[str],
) -> Departure:
    before = [sums.running[read].error for node in nodes for read in node.input if read in sums.running]
    maker = candidate.makers[name]
    return Departure(
        value=name,
        operator=maker.operator,
        name=maker.name,
        layer=_layer(layers.get(nodes[0].name, ""), nodes[0].op_type),
        bits=bits,
        error=sums.own[name].error,
        explained=sums.rounded[name].error if bits < 32 else 0.0,
        before=max(before, default=0.0),
        after=sums.running[name].error,
        weights=_weighty(nodes, stored),
    )


def _weighty(nodes: Sequence[onnx.NodeProto], stored: frozenset[str]) -> str:
    return next((node.name for node in nodes if stored.intersection(node.input)), "")


def _layer(weight: str, operator: str) -> str:
    """The module path behind a weight's name; an attention fused whole is no part of its own."""
    module = re.sub(r"\.(weight|bias)\b.*$", "", weight) if _PARAMETER.search(weight) else weight.rpartition(".")[0]
    found = re.match(r".*?att(entio)?n\b", module) if "Attention" in operator else None
    return found[0] if found else module


def _alone(
    one: Departure,
    answer: str,
    reference: OnnxParts,
    runs: _Runs,
    cuts: Mapping[str, np.ndarray],
    batches: Sequence[Values],
) -> Departure:
    """With the error of the answers where the reference is given what this part alone makes."""
    if answer == one.value:
        return replace(one, alone=one.error)
    shown = {one.value: cuts[one.value].astype(np.float32), answer: np.empty(0, np.float32)}
    patched, gap = reference.apart(shown, given=[one.value]), Gap()
    for batch in batches:
        values = runs.whole(batch)
        wrong = runs.own({**batch, **{name: values[name] for name in cuts}})[one.value]
        gap.add(values[answer], patched({**batch, one.value: wrong})[answer])
    return replace(one, alone=gap.error)
