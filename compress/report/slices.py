"""Quality by slice of the test data: the baseline and the final model, side by side, as figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.numerics.differences import paired_bootstrap, paired_difference
from compress.numerics.statistics import Estimate
from compress.results.formatting import format_measurement
from compress.results.measurement import Measurement
from compress.results.metrics import Metric, metric_on_slice, quality_metric, slice_of, split_of
from compress.results.report import BASELINE, FINAL, Report, SliceRecord

ALL = "all rows"
_PERPLEXITY = "perplexity"
_SEED = 0


@dataclass(frozen=True)
class SliceFigures:
    """A slice with its rows of the baseline and the final model, and by how much they differ, if that is known."""

    name: str
    about: str
    rows: int
    measured: dict[str, Measurement]
    change: Estimate | None


def slice_figures(report: Report, target: str) -> tuple[Metric, list[SliceFigures]] | None:
    """The quality metric and its slices, all rows first; None where nothing was measured by slice."""
    metric = quality_metric(report.metrics(target))
    if metric is None or not report.slices:
        return None
    whole = _rows(report, metric.name, target)
    count = max((row.n for row in whole.values()), default=0)
    figures = [SliceFigures(ALL, "", count, whole, _change(whole, None))]
    for name, part in report.slices.items():
        measured = _rows(report, metric_on_slice(metric.name, name), target)
        if measured:
            figures.append(SliceFigures(name, part.about, part.rows, measured, _change(whole, part)))
    return (metric, figures) if len(figures) > 1 else None


def _rows(report: Report, metric: str, target: str) -> dict[str, Measurement]:
    found = {model: report.find(model, metric, target) for model in (BASELINE, FINAL)}
    return {model: row for model, row in found.items() if row is not None}


def _change(whole: dict[str, Measurement], part: SliceRecord | None) -> Estimate | None:
    """The final model's share of right answers less the baseline's, paired row by row, with its 95% interval."""
    old, new = (whole[model].raw if model in whole else None for model in (BASELINE, FINAL))
    if old is None or new is None or len(old) != len(new) or {*old, *new} - {0.0, 1.0}:
        return None
    rows = range(len(old)) if part is None else part.indices()
    if rows[-1] >= len(old):
        return None
    return paired_difference([old[row] for row in rows], [new[row] for row in rows], 0.95)


def format_change(change: Estimate | None) -> str:
    """`-1.20 points (-2.31 to -0.09)`, with real minus signs; nothing where the change is not known."""
    if change is None:
        return ""
    value, low, high = (f"{bound * 100:+.2f}".replace("-", "\u2212") for bound in change)
    return f"{value} points ({low} to {high})"


def slice_cells(figures: Sequence[SliceFigures]) -> list[tuple[str, str, str, str, str, str]]:
    """For each slice: name, what it holds, rows, baseline, final, change; all as text."""
    cells = []
    for each in figures:
        values = [format_measurement(each.measured[m]) if m in each.measured else "" for m in (BASELINE, FINAL)]
        cells.append((each.name, each.about, f"{each.rows:,}", values[0], values[1], format_change(each.change)))
    return cells


def text_cells(report: Report, target: str) -> list[tuple[str, str, str, str]]:
    """Perplexity on the test split, on each split judged beside it and of each kind of its tokens.

    Each as text: what is judged, baseline, final, and the change with its 95% interval, paired window by window.
    Nothing where the test split is judged alone.
    """
    metrics = [name for name in report.metrics(target) if (split_of(name) or ("", ""))[0] == _PERPLEXITY]
    cells = []
    for name in [_PERPLEXITY, *metrics] if metrics else ():
        rows = _rows(report, name, target)
        elsewhere, kind = split_of(name), slice_of(name)
        shown = elsewhere[1] if elsewhere else "test"
        old, new = (format_measurement(rows[model]) if model in rows else "" for model in (BASELINE, FINAL))
        cells.append((f"{shown}, {kind[1]}" if kind else shown, old, new, _growth(rows)))
    return cells


def _growth(rows: dict[str, Measurement]) -> str:
    """By how much perplexity grew: `+9.2% (8.1% to 10.4%)`; nothing where the windows don't pair."""
    old, new = (rows[model].raw if model in rows else None for model in (BASELINE, FINAL))
    if old is None or new is None or len(old) != len(new) or len(old) < 2:
        return ""
    found = paired_bootstrap(old, new, lambda a, b: float(np.expm1(b.mean() - a.mean())), _SEED, confidence=0.95)
    value, low, high = (f"{bound:+.1%}".replace("-", "\u2212") for bound in found)
    return f"{value} ({low} to {high})"
