"""One series as an SVG line: values with their interval band, the levels they kept to, and the changes marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby, pairwise
from typing import Literal, NamedTuple

from compress.plugins.nightly.drift import changes_on_night
from compress.plugins.nightly.record import Night
from compress.plugins.nightly.trend import Series, TrendLevel, TrendPoint
from compress.report.plot import Frame, Plot, Scale, element, line, polyline_points, scale_around, text, with_tooltip
from compress.results.formatting import format_interval, format_number, format_value
from compress.results.metrics import Metric

_FRAME = Frame(480.0, 214.0, 68.0, 464.0, 42.0, 188.0)
_LEAST_SPAN = 0.06
"""Least height of the y-axis as a share of the value, so that noise in the last digit does not look large."""
_LEAST_SPAN_OF_SHARE = 0.01
_LABEL_WIDTH = 58.0
_MANY = 60


class LevelChange(NamedTuple):
    """A change of level as people read it: its first night, size, values, and what else was new that night."""

    series: Series
    first: int
    since: str
    values: str
    new: str
    state: Literal["worse", "better", "other"]
    words: str


def level_changes(series: Series, nights: Mapping[int, Night]) -> list[LevelChange]:
    """Every change of level, in the order of the nights. The state is `other` where nobody knows which is better."""
    return [_change(series, before, after, nights) for before, after in pairwise(series.levels)]


def _change(series: Series, before: TrendLevel, after: TrendLevel, nights: Mapping[int, Night]) -> LevelChange:
    first, effect = series.usable[after.first].night, series.effect(before.value, after.value)
    loss, metric = series.loss(effect), series.described
    return LevelChange(
        series,
        first,
        _label(nights, first),
        f"{format_value(metric, before.value)} \u2192 {format_value(metric, after.value)}",
        "; ".join(changes_on_night(nights, series.entry, first)),
        "worse" if loss > 0 else "better" if loss < 0 else "other",
        series.written(effect),
    )


def _label(nights: Mapping[int, Night], number: int) -> str:
    return nights[number].label if number in nights else f"night {number}"


def trend_chart(series: Series, nights: Mapping[int, Night], failed: AbstractSet[int]) -> str:
    """The chart of ``series``; ``failed`` holds the numbers of nights whose gate this metric failed."""
    points, metric = series.points, series.described
    first, last = points[0].night, points[-1].night
    x = Scale(first - 0.5, max(last, first + 1) + 0.5, _FRAME.left, _FRAME.right)
    plot = Plot(_FRAME, x, _y_scale(series))
    plot.y_axis("", lambda value: _tick(metric, value), 4)
    plot.x_axis_line()
    _days(plot, points)
    for known, stretch in groupby(points, lambda point: point.low is not None and point.high is not None):
        if known:
            ends = [(point.night, point.low or 0.0, point.high or 0.0) for point in stretch]
            corners = [(night, high) for night, _, high in ends] + [(night, low) for night, low, _ in reversed(ends)]
            plot.add(element("polygon", {"points": polyline_points(map(plot.at, corners)), "class": "band"}))
    for level in series.levels:
        start, end = series.usable[level.first].night - 0.4, series.usable[level.last].night + 0.4
        plot.add(plot.straight((start, level.value), (end, level.value), "level"))
    plot.add(plot.line([(point.night, point.value) for point in points], "curve"))
    _changes(plot, level_changes(series, nights))
    for point in points:
        plot.add(_point(plot, series, point, _label(nights, point.night), point.night in failed))
    return plot.svg(f"{metric.title} of {series.model} of {series.entry} over {len(points)} nights")


def _y_scale(series: Series) -> Scale:
    values = [value for point in series.points for value in (point.value, point.low, point.high) if value is not None]
    middle = series.levels[-1].value if series.levels else series.points[-1].value
    span = _LEAST_SPAN_OF_SHARE if series.is_share else _LEAST_SPAN * abs(middle)
    return scale_around([*values, middle - span / 2, middle + span / 2], _FRAME.bottom, _FRAME.top)


def _tick(metric: Metric, value: float) -> str:
    """Without the unit where that is long: the heading's value has it."""
    return format_number(value) if metric.style in ("rate", "plain") else format_value(metric, value)


def _days(plot: Plot, points: Sequence[TrendPoint]) -> None:
    """Dates of up to four nights below the axis."""
    count, end = min(4, len(points)), len(points) - 1
    for place in sorted({round(place * end / max(1, count - 1)) for place in range(count)}):
        at, last = plot.x(points[place].night), place == end > 0
        anchor = "end" if last else "start" if place == 0 < end else "middle"
        plot.add(line(at, _FRAME.bottom, at, _FRAME.bottom + 4, "axis"))
        plot.add(text(at + (8 if last else 0), _FRAME.bottom + 19, points[place].started[5:10], "tick", anchor))


def _changes(plot: Plot, changes: Sequence[LevelChange]) -> None:
    """A mark at the first night of each new level, with its size above; labels that would meet take a second row."""
    ends = [-1e9, -1e9]
    for change in changes:
        at, half = plot.x(change.first - 0.5), _LABEL_WIDTH / 2
        middle = min(max(at, _FRAME.left + half), _FRAME.right - half)
        row = 0 if middle - half >= ends[0] else 1
        ends[row] = middle + half
        down = _FRAME.top - 10 - 16 * row
        words = [f"{change.words} since {change.since}", change.values, *change.new.split("; ")]
        mark, size = line(at, down + 4, at, _FRAME.bottom, "mark"), text(middle, down, change.words, "size")
        plot.add(with_tooltip(f"change {change.state}", "\n".join(filter(None, words)), mark, size))


def _point(plot: Plot, series: Series, point: TrendPoint, label: str, failed: bool) -> str:
    metric = series.described
    interval = format_interval(metric, point.low, point.high)
    words = f"{label}\n{format_value(metric, point.value)}" + (f" ({interval})" if interval else "")
    words += "\nthe gate failed" if failed else ""
    disturbed = point not in series.usable
    words += "\nthe machine was too disturbed: not judged" if disturbed else ""
    radius = (4.5 if failed else 1.8) if len(series.points) > _MANY else (5.5 if failed else 3.0)
    css_class = f"point{' failed' if failed else ''}{' disturbed' if disturbed else ''}"
    # Hundreds of nights are told to a pointer; a keyboard goes from change to change.
    return plot.dot((point.night, point.value), radius, css_class, words, focus="-1")
