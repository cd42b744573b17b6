"""Series of measurements over nights, and the constant levels that they consist of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import NamedTuple

from compress.plugins.nightly.record import Host, Night, Rows
from compress.results.formatting import format_number
from compress.results.metrics import Metric, describe_metric

TIMES = ("milliseconds", "rate", "times")
"""Styles of metrics that depend on the load of the machine."""


class TrendPoint(NamedTuple):
    """Value of one night with its 95% interval, if it has one."""

    night: int
    started: str
    value: float
    low: float | None
    high: float | None
    quiet: bool = True
    """False if the machine was too noisy for its times to be usable."""


class TrendLevel(NamedTuple):
    """Points between two changes: indices ``first`` to ``last`` in the series' `usable` points, and their median."""

    first: int
    last: int
    value: float


@dataclass(frozen=True)
class Series:
    """Measurements of one metric of one model of one entry, on one target and one host.

    Points are in the order of nights, which is not always the order of the clock.
    """

    entry: str
    model: str
    metric: str
    target: str
    unit: str
    host: Host
    points: tuple[TrendPoint, ...]

    @property
    def described(self) -> Metric:
        """Return the description of the metric."""
        return describe_metric(self.metric, self.unit)

    @property
    def is_share(self) -> bool:
        """Return whether differences are given in points, as of an accuracy, and not relative to the value."""
        return self.described.style == "percent"

    @cached_property
    def usable(self) -> tuple[TrendPoint, ...]:
        """Return the points, without times that were measured on a disturbed machine."""
        timed = self.described.style in TIMES
        return tuple(point for point in self.points if point.quiet or not timed)

    @cached_property
    def levels(self) -> tuple[TrendLevel, ...]:
        """Return the levels of the series: one if it never changed, none without a usable point.

        Change points of costs are searched on their logarithm, those of shares on their values.
        """
        from compress.plugins.nightly.changepoint import change_points

        values = [point.value for point in self.usable]
        if not values:
            return ()
        # On a logarithmic scale a change by 5% has the same size at every level.
        logarithmic = not self.is_share and min(values) > 0
        changes = change_points([math.log(value) for value in values] if logarithmic else values)
        bounds = [0, *(change.position for change in changes), len(values)]
        return tuple(TrendLevel(first, last - 1, median(values[first:last])) for first, last in pairwise(bounds))

    def effect(self, before: float, after: float) -> float:
        """Return the difference of two shares, else the relative change."""
        if self.is_share or before == 0:
            return after - before
        return after / before - 1

    def loss(self, effect: float) -> float:
        """Return the effect with a positive sign if it is for the worse; 0 if the metric has no direction."""
        return effect * {"lower": 1.0, "higher": -1.0, "unknown": 0.0}[self.described.better]

    def written(self, effect: float) -> str:
        """Return `+6.1%`, or `-0.8 points` of a share."""
        sign = "+" if effect > 0 else "-" if effect < 0 else ""
        return f"{sign}{format_number(abs(effect) * 100, 2)}{' points' if self.is_share else '%'}"


def extend_series(series: Sequence[Series], night: Night, rows: Rows) -> list[Series]:
    """Return the series as they will be once ``night`` and its ``rows`` are in the history."""
    lines = {(line.entry, line.model, line.metric, line.target, line.host.digest): line for line in series}
    quiet = {outcome.entry: outcome.noise != "unusable" for outcome in night.outcomes}
    for entry, measured in rows.items():
        for row in measured:
            # A new metric, model or host begins a series of its own.
            key = (entry, row.model, row.metric, row.target, night.host.digest)
            line = lines.get(key) or Series(entry, row.model, row.metric, row.target, row.unit, night.host, ())
            point = TrendPoint(night.number, night.started, row.value, row.low, row.high, quiet.get(entry, True))
            lines[key] = replace(line, points=(*line.points, point))
    return list(lines.values())
