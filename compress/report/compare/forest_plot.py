"""Forest plot: effects with their intervals against margins, one row for each change, worse to the right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from compress.report.compare.change import MetricChange
from compress.report.compare.formatting import VERDICT_TEXTS, confidence_text, effect_text, interval_text, margin_text
from compress.report.plot import Scale, nice_ticks
from compress.results.formatting import format_number
from compress.results.metrics import describe_metric

_FACTORS = (1.01, 1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
_FURTHEST = math.log(1000.0)
_PAD = 0.06
_CLOSEST = 0.13
"""Smallest distance of two tick labels as a share of the width."""


def effect_axis(changes: Sequence[MetricChange]) -> Scale:
    """Return a scale in per cent of the width: losses in points of a share, or logarithms of ratios.

    It contains every effect and margin, and of the intervals as much as keeps those visible.
    """
    bounds = [_losses(change) for change in changes]
    margins = [_on_axis(change, change.margin) for change in changes]
    reach = 2.5 * max([*margins, *(abs(value) for value, _, _ in bounds), 1e-4])
    ends = [0.0, *margins, *(-margin for margin in margins)]
    for value, low, high in bounds:
        ends += [value, max(low, -reach), min(high, reach)]
    pad = (max(ends) - min(ends)) * _PAD or 1e-4
    return Scale(min(ends) - pad, max(ends) + pad, 0.0, 100.0)


def ticks(axis: Scale, relative: bool) -> list[tuple[float, str]]:
    """Return losses with their labels, far enough apart to be read. 0 is always one."""
    if relative:
        steps = [
            (math.log(factor), f"{factor:g}x" if factor >= 2 else f"{(factor - 1) * 100:g}%") for factor in _FACTORS
        ]
    else:
        steps = [
            (tick, format_number(tick * 100, 2)) for tick in nice_ticks(0.0, max(axis.high, -axis.low), 4) if tick > 0
        ]
    placed, distance = [(0.0, "0")], _CLOSEST * (axis.high - axis.low)
    for size, words in reversed(steps):
        for loss in (size, -size):
            if axis.low <= loss <= axis.high and all(abs(loss - other) >= distance for other, _ in placed):
                placed.append((loss, words))
    return sorted(placed)


class IntervalBar(NamedTuple):
    """Positions of a change in per cent of the width: band of the margin, ticks, interval, its ends, and effect."""

    band: tuple[float, float]
    ticks: list[tuple[float, str]]
    span: tuple[float, float] | None
    ends: list[float]
    value: float


def interval_bar(change: MetricChange, axis: Scale) -> IntervalBar:
    """Return the change as a dot with its interval, over the band in which it would not matter."""
    value, low, high = _losses(change)
    margin = _on_axis(change, change.margin)
    grid = [(axis(loss), "grid" if loss else "zero") for loss, _ in ticks(axis, change.scale == "relative")]
    ends = [axis(end) for end in (low, high) if low < high and axis.low <= end <= axis.high]
    span = (axis(low), axis(high)) if low < high else None
    return IntervalBar((axis(-margin), axis(margin) - axis(-margin)), grid, span, ends, axis(value))


def change_tooltip(change: MetricChange) -> str:
    """Return the change as text for a tooltip and a screen reader."""
    interval = interval_text(change)
    interval_phrase = f", {confidence_text(change)} interval {interval}" if interval else ""
    verdict = f"{margin_phrase(change)}: {VERDICT_TEXTS[change.verdict]}"
    return f"{change.metric}: {effect_text(change)}{interval_phrase}; {verdict}"


def margin_phrase(change: MetricChange) -> str:
    """Return which changes matter, as a phrase."""
    return f"matters from {margin_text(change)}" if change.margin else "any change matters"


def _losses(change: MetricChange) -> tuple[float, float, float]:
    """Return effect, low and high with signs such that larger is worse."""
    value, low, high = (_on_axis(change, effect) for effect in (change.effect, change.low, change.high))
    if describe_metric(change.metric, change.unit).better == "higher":
        return -value, -high, -low
    return value, low, high


def _on_axis(change: MetricChange, effect: float) -> float:
    if change.scale == "absolute":
        return effect
    return max(-_FURTHEST, min(_FURTHEST, math.log1p(effect))) if effect > -1 else -_FURTHEST
