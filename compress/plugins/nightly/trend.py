"""Series over nights, and the levels that they keep to."""

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
    """One night's value with its 95% interval, where that is known."""

    night: int
    started: str
    value: float
    low: float | None
    high: float | None
    quiet: bool = True
    """False where the benchmark found the machine too noisy for its times to be usable."""


class TrendLevel(NamedTuple):
    """Nights between two changes: places ``first`` to ``last`` of the series' `usable` points, and their median."""

    first: int
    last: int
    value: float


@dataclass(frozen=True)
class Series:
    """One line of the trend page: one quantity of one model of one entry, on one target and one host.

    Points are in the order of nights, which is not always that of the clock.
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
        """What is known of the metric."""
        return describe_metric(self.metric, self.unit)

    @property
    def is_share(self) -> bool:
        """Whether differences are told in points, as of an accuracy, and not as parts of the value."""
        return self.described.style == "percent"

    @cached_property
    def usable(self) -> tuple[TrendPoint, ...]:
        """The points, without times that were taken on a machine too disturbed."""
        timed = self.described.style in TIMES
        return tuple(point for point in self.points if point.quiet or not timed)

    @cached_property
    def levels(self) -> tuple[TrendLevel, ...]:
        """The levels that the series kept to: one where it never changed, none without a usable point.

        Costs change by their logarithm, shares as they are.
        """
        from compress.numerics.changepoint import change_points

        values = [point.value for point in self.usable]
        if not values:
            return ()
        logarithmic = not self.is_share and min(values) > 0
        found = change_points([math.log(value) for value in values] if logarithmic else values)
        bounds = [0, *(change.position for change in found), len(values)]
        return tuple(TrendLevel(first, last - 1, median(values[first:last])) for first, last in pairwise(bounds))

    def effect(self, before: float, after: float) -> float:
        """The difference of two shares, else how much larger ``after`` is as a part of ``before``."""
        if self.is_share or before == 0:
            return after - before
        return after / before - 1

    def loss(self, effect: float) -> float:
        """The effect, positive where it is for the worse; 0 where nobody knows which way is better."""
        return effect * {"lower": 1.0, "higher": -1.0, "unknown": 0.0}[self.described.better]

    def written(self, effect: float) -> str:
        """`+6.1%`, or `-0.8 points` of a share."""
        sign = "+" if effect > 0 else "-" if effect < 0 else ""
        return f"{sign}{format_number(abs(effect) * 100, 2)}{' points' if self.is_share else '%'}"


def extend_series(series: Sequence[Series], night: Night, rows: Rows) -> list[Series]:
    """The series as they will be when ``night`` and its ``rows`` are in the history."""
    known = {(one.entry, one.model, one.metric, one.target, one.host.digest): one for one in series}
    quiet = {outcome.entry: outcome.noise != "unusable" for outcome in night.outcomes}
    for entry, measured in rows.items():
        for row in measured:
            key = (entry, row.model, row.metric, row.target, night.host.digest)
            one = known.get(key) or Series(entry, row.model, row.metric, row.target, row.unit, night.host, ())
            point = TrendPoint(night.number, night.started, row.value, row.low, row.high, quiet.get(entry, True))
            known[key] = replace(one, points=(*one.points, point))
    return list(known.values())
