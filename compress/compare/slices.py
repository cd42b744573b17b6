"""Accuracy by slice of the test data: what changed in each part, judged together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from compress.compare.change import Change, SliceChange
from compress.measurement import Measurement
from compress.numerics.differences import decide, paired_difference, samples_to_settle
from compress.numerics.statistics import Estimate
from compress.report.schema import FINAL, Report, SliceRecord


def slice_changes(
    baseline: Report,
    candidate: Report,
    target: str,
    margin: float,
    confidence: float,
    *,
    baseline_model: str = FINAL,
    candidate_model: str = FINAL,
    metric: str = "accuracy",
) -> tuple[SliceChange, ...]:
    """The change of ``metric`` in each slice of the test data, the largest fall first; empty where nothing pairs.

    Of many slices one looks bad by chance. So each interval is made at 1 - (1 - ``confidence``) / m for m slices
    (Bonferroni; Dunn 1961): together they hold all true changes with at least ``confidence``, whether slices overlap
    or not, and of equally good models at most about (1 - ``confidence``) / 2 of the comparisons call any slice worse.
    The slices are the candidate's, or the baseline's where the candidate's report keeps none. ``margin`` is a
    difference of shares: 0.005 is half a point. `why_no_slices` says why the result is empty.
    """
    before, after = (
        report.find(model, metric, target)
        for report, model in ((baseline, baseline_model), (candidate, candidate_model))
    )
    if before is None or after is None or why_no_slices(baseline, candidate, before, after):
        return ()
    slices = _slices(baseline, candidate)
    each = 1 - (1 - confidence) / len(slices)
    note = f"{len(slices)} slices are judged together: each interval is made at {each:.2%}" if len(slices) > 1 else None
    changes = [
        SliceChange(name=name, rows=part.rows, change=_change(before, after, part, margin, each, note))
        for name, part in slices.items()
    ]
    return tuple(sorted(changes, key=lambda part: part.change.effect))


def largest_change(slices: Iterable[SliceChange]) -> SliceChange | None:
    """The slice that changed most, for better or worse."""
    return max(slices, key=lambda part: abs(part.change.effect), default=None)


def why_no_slices(
    baseline: Report, candidate: Report, before: Measurement | None, after: Measurement | None
) -> str | None:
    """Why the outcomes of two rows cannot be compared slice by slice; None where they can."""
    if not _slices(baseline, candidate):
        return "neither report keeps slices; both were written by an older compress, or their recipes name none"
    if before is None or after is None or before.raw is None or after.raw is None:
        return "the outcome of each row was not kept on both sides"
    if len(before.raw) != len(after.raw):
        return f"the test splits differ: {len(before.raw)} and {len(after.raw)} rows"
    if baseline.data and candidate.data and baseline.data.digest != candidate.data.digest:
        return "the test splits differ"
    if {*before.raw, *after.raw} - {0.0, 1.0}:
        return f"{before.metric} is not right or wrong row by row"
    if any(part.indices()[-1] >= len(before.raw) for part in _slices(baseline, candidate).values()):
        return "the slices name rows that the test split does not have"
    return None


def _slices(baseline: Report, candidate: Report) -> Mapping[str, SliceRecord]:
    return candidate.slices or baseline.slices


def _change(
    before: Measurement, after: Measurement, part: SliceRecord, margin: float, confidence: float, note: str | None
) -> Change:
    rows = list(part.indices())
    old, new = (np.array(row.raw)[rows] for row in (before, after))
    effect = paired_difference(old, new, confidence)
    loss = Estimate(-effect.value, -effect.high, -effect.low)
    return Change(
        metric=after.metric,
        target=after.target,
        unit=after.unit,
        baseline=float(old.mean()),
        candidate=float(new.mean()),
        scale="absolute",
        effect=effect.value,
        low=effect.low,
        high=effect.high,
        confidence=confidence,
        margin=margin,
        verdict=decide(loss, margin),
        n=len(rows),
        more=samples_to_settle(loss, margin, len(rows)),
        method="paired outcomes, adjusted Wald interval (Agresti and Min 2005), Bonferroni over slices",
        note=note,
    )
