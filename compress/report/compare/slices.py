"""Accuracy by slice of the test data: the change of each slice, judged together."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from compress.numerics.differences import paired_difference
from compress.recipe.policy import Margin
from compress.report.compare.change import ComparedModels, SliceChange
from compress.report.compare.effects import MeasurementPair, make_change

_METHOD = "paired outcomes, adjusted Wald interval (Agresti and Min 2005), Bonferroni over slices"


def slice_changes(
    sides: ComparedModels, target: str, margin: float, confidence: float, metric: str = "accuracy"
) -> tuple[SliceChange, ...]:
    """Return the change of ``metric`` in each slice of the test data, the largest fall first, or nothing without pairs.

    Among many slices one looks bad by chance. So each interval has a confidence of 1 - (1 - ``confidence``) / m for m
    slices (Bonferroni; Dunn 1961). Together they contain all true changes with at least ``confidence``, whether slices
    overlap or not. For equally good models, at most about (1 - ``confidence``) / 2 of the comparisons call any slice
    worse. The slices are the candidate's, or the baseline's if the candidate's report has none.

    Args:
        sides: Compared models.
        target: Target of the measurements.
        margin: Smallest difference of shares that matters: 0.005 is half a point.
        confidence: Confidence of all intervals together.
        metric: Metric of which outcomes count.
    """
    (baseline, candidate), raw = sides.rows(metric, target), sides.outcomes(metric, target)
    slices = {
        name: (measurements.rows, measurements.indices())
        for name, measurements in (sides.candidate.slices or sides.baseline.slices).items()
    }
    if raw is None or baseline is None or candidate is None or not slices or {*raw[0], *raw[1]} - {0.0, 1.0}:
        return ()
    if any(indices[-1] >= len(raw[0]) for _, indices in slices.values()):
        return ()
    slice_confidence = 1 - (1 - confidence) / len(slices)
    note = (
        f"{len(slices)} slices are judged together: each interval is made at {slice_confidence:.2%}"
        if len(slices) > 1
        else None
    )
    changes = []
    for name, (count, indices) in slices.items():
        baseline_outcomes, candidate_outcomes = ([outcomes[index] for index in indices] for outcomes in raw)
        estimate = paired_difference(baseline_outcomes, candidate_outcomes, slice_confidence)
        measurements = (
            baseline.model_copy(update={"value": fmean(baseline_outcomes)}),
            candidate.model_copy(update={"value": fmean(candidate_outcomes)}),
        )
        pair = MeasurementPair(measurements[0], measurements[1], Margin(margin, relative=False))
        changes.append(
            SliceChange(
                name=name, rows=count, change=make_change(pair, estimate, slice_confidence, count, _METHOD, note)
            )
        )
    return tuple(sorted(changes, key=lambda measurements: measurements.change.effect))


def largest_change(slices: Iterable[SliceChange]) -> SliceChange | None:
    """Return the slice that changed most, for better or worse."""
    return max(slices, key=lambda part: abs(part.change.effect), default=None)
