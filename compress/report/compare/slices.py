"""Accuracy by slice of the test data: what changed in each part, judged together."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

from compress.numerics.differences import paired_difference
from compress.recipe.policy import Margin
from compress.report.compare.change import Sides, SliceChange
from compress.report.compare.effects import Pair, make_change

_METHOD = "paired outcomes, adjusted Wald interval (Agresti and Min 2005), Bonferroni over slices"


def slice_changes(
    sides: Sides, target: str, margin: float, confidence: float, metric: str = "accuracy"
) -> tuple[SliceChange, ...]:
    """The change of ``metric`` in each slice of the test data, the largest fall first; empty where nothing pairs.

    Of many slices one looks bad by chance. So each interval is made at 1 - (1 - ``confidence``) / m for m slices
    (Bonferroni; Dunn 1961): together they hold all true changes with at least ``confidence``, whether slices overlap
    or not, and of equally good models at most about (1 - ``confidence``) / 2 of the comparisons call any slice worse.
    The slices are the candidate's, or the baseline's where the candidate's report keeps none. ``margin`` is a
    difference of shares: 0.005 is half a point.
    """
    (before, after), raw = sides.rows(metric, target), sides.outcomes(metric, target)
    slices = {
        name: (part.rows, part.indices()) for name, part in (sides.candidate.slices or sides.baseline.slices).items()
    }
    if raw is None or before is None or after is None or not slices or {*raw[0], *raw[1]} - {0.0, 1.0}:
        return ()
    if any(indices[-1] >= len(raw[0]) for _, indices in slices.values()):
        return ()
    each = 1 - (1 - confidence) / len(slices)
    note = f"{len(slices)} slices are judged together: each interval is made at {each:.2%}" if len(slices) > 1 else None
    changes = []
    for name, (count, indices) in slices.items():
        old, new = ([outcomes[index] for index in indices] for outcomes in raw)
        found = paired_difference(old, new, each)
        part = (before.model_copy(update={"value": fmean(old)}), after.model_copy(update={"value": fmean(new)}))
        pair = Pair(part[0], part[1], Margin(margin, relative=False))
        changes.append(SliceChange(name=name, rows=count, change=make_change(pair, found, each, count, _METHOD, note)))
    return tuple(sorted(changes, key=lambda part: part.change.effect))


def largest_change(slices: Iterable[SliceChange]) -> SliceChange | None:
    """The slice that changed most, for better or worse."""
    return max(slices, key=lambda part: abs(part.change.effect), default=None)
