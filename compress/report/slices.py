"""Quality by slice of the test data: the baseline beside the final model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.numerics.differences import paired_bootstrap, paired_difference
from compress.numerics.statistics import IntervalEstimate
from compress.results.formatting import format_measurement
from compress.results.metrics import Metric, metric_on_slice, quality_metric, slice_of, split_of
from compress.results.report import BASELINE, FINAL, Measurement, Report, SliceRecord

ALL = "all rows"
_PERPLEXITY = "perplexity"
_SEED = 0


@dataclass(frozen=True)
class SliceResult:
    """Slice with its measurements of the baseline and the final model, and their difference if it is known."""

    name: str
    about: str
    rows: int
    measured: dict[str, Measurement]
    change: IntervalEstimate | None


def slice_results(report: Report, target: str) -> tuple[Metric, list[SliceResult]] | None:
    """Return the quality metric and its slices, all rows first, or None if nothing was measured by slice."""
    metric = quality_metric(report.metrics(target))
    if metric is None or not report.slices:
        return None
    whole = _rows(report, metric.name, target)
    count = max((row.n for row in whole.values()), default=0)
    results = [SliceResult(ALL, "", count, whole, _change(whole, None))]
    for name, record in report.slices.items():
        measured = _rows(report, metric_on_slice(metric.name, name), target)
        if measured:
            results.append(SliceResult(name, record.about, record.rows, measured, _change(whole, record)))
    return (metric, results) if len(results) > 1 else None


def _rows(report: Report, metric: str, target: str) -> dict[str, Measurement]:
    measurements = {model: report.find(model, metric, target) for model in (BASELINE, FINAL)}
    return {model: row for model, row in measurements.items() if row is not None}


def _change(whole: dict[str, Measurement], record: SliceRecord | None) -> IntervalEstimate | None:
    """Return the final model's share of correct answers less the baseline's, paired by row, with its 95% interval."""
    baseline, final = (whole[model].raw if model in whole else None for model in (BASELINE, FINAL))
    if baseline is None or final is None or len(baseline) != len(final) or {*baseline, *final} - {0.0, 1.0}:
        return None
    rows = range(len(baseline)) if record is None else record.indices()
    if rows[-1] >= len(baseline):
        return None
    return paired_difference([baseline[row] for row in rows], [final[row] for row in rows], 0.95)


def format_change(change: IntervalEstimate | None) -> str:
    """Return `-1.20 points (-2.31 to -0.09)` with true minus signs, or nothing if the change is unknown."""
    if change is None:
        return ""
    value, low, high = (f"{bound * 100:+.2f}".replace("-", "\u2212") for bound in change)
    return f"{value} points ({low} to {high})"


def slice_cells(results: Sequence[SliceResult]) -> list[tuple[str, str, str, str, str, str]]:
    """Return name, description, rows, baseline, final and change of each slice, as text."""
    cells = []
    for result in results:
        values = [
            format_measurement(result.measured[model]) if model in result.measured else ""
            for model in (BASELINE, FINAL)
        ]
        cells.append(
            (result.name, result.about, f"{result.rows:,}", values[0], values[1], format_change(result.change))
        )
    return cells


def perplexity_cells(report: Report, target: str) -> list[tuple[str, str, str, str]]:
    """Return perplexity on the test split, on each other split, and of each kind of token.

    Each has a name, the baseline's and the final model's value, and the change with its 95% interval, paired by
    sequence, as text. Nothing is returned if only the test split is evaluated.
    """
    metrics = [name for name in report.metrics(target) if (split_of(name) or ("", ""))[0] == _PERPLEXITY]
    cells = []
    for name in [_PERPLEXITY, *metrics] if metrics else ():
        rows = _rows(report, name, target)
        on_split, kind = split_of(name), slice_of(name)
        split = on_split[1] if on_split else "test"
        baseline, final = (format_measurement(rows[model]) if model in rows else "" for model in (BASELINE, FINAL))
        # The increase of perplexity, `+9.2% (8.1% to 10.4%)`, or nothing if sequences don't pair.
        change, samples = "", [row.raw for row in rows.values() if row.raw]
        if len(samples) == 2 and len(samples[0]) == len(samples[1]) > 1:
            old, new = samples
            growth = paired_bootstrap(
                old, new, lambda a, b: float(np.expm1(b.mean() - a.mean())), _SEED, confidence=0.95
            )
            value, low, high = (f"{bound:+.1%}".replace("-", "\u2212") for bound in growth)
            change = f"{value} ({low} to {high})"
        cells.append((f"{split}, {kind[1]}" if kind else split, baseline, final, change))
    return cells
