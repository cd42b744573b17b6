"""One series as an SVG line: values with their interval band, the levels they kept to, and the changes marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from typing import Literal, NamedTuple

from markupsafe import Markup

from compress.metrics import Metric, format_interval, format_value, significant
from compress.nightly.drift import suspects
from compress.nightly.record import Night
from compress.nightly.trend import Level, Point, Series
from compress.report.markup import Attribute, element, number
from compress.report.svg import Axis, Scale, chart, line, polyline, scale_around, text, title, y_axis

WIDTH, HEIGHT = 480.0, 214.0
LEFT, RIGHT, TOP, BOTTOM = 68.0, 464.0, 42.0, 188.0
_LEAST_SPAN = 0.06
"""Of a cost, as a part of it: a calm line is drawn calm, whatever its last digit does."""
_LEAST_SPAN_OF_SHARE = 0.01
_LABEL_WIDTH = 58.0


def trend_chart(series: Series, nights: Mapping[int, Night], failed: AbstractSet[int]) -> str:
    """The chart of ``series``; ``failed`` holds the numbers of nights whose gate this metric failed."""
    x, y = _x_scale(series.points), _y_scale(series)
    metric = series.described
    parts = [y_axis(Axis(y, "", lambda value: _tick(metric, value), 4), LEFT, RIGHT), _days(series.points, x)]
    parts += [_band(series.points, x, y)]
    parts += [_level(series, level, x, y) for level in series.levels]
    parts += [polyline([(x(point.night), y(point.value)) for point in series.points], "curve")]
    parts += _changes(series, nights, x)
    small = len(series.points) > 60
    parts += [_point(series, point, nights, point.night in failed, x, y, small) for point in series.points]
    label = f"{metric.title} of {series.model} of {series.entry} over {len(series.points)} nights"
    return chart(WIDTH, HEIGHT, label, *parts)


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


def _change(series: Series, before: Level, after: Level, nights: Mapping[int, Night]) -> LevelChange:
    first, effect = series.usable[after.first].night, series.effect(before.value, after.value)
    loss, metric = series.loss(effect), series.described
    return LevelChange(
        series,
        first,
        _label(nights, first),
        f"{format_value(metric, before.value)} \u2192 {format_value(metric, after.value)}",
        "; ".join(suspects(nights, series.entry, first)),
        "worse" if loss > 0 else "better" if loss < 0 else "other",
        series.written(effect),
    )


def _label(nights: Mapping[int, Night], number: int) -> str:
    return nights[number].label if number in nights else f"night {number}"


def _x_scale(points: Sequence[Point]) -> Scale:
    first, last = points[0].night, points[-1].night
    return Scale(first - 0.5, max(last, first + 1) + 0.5, LEFT, RIGHT)


def _y_scale(series: Series) -> Scale:
    values = [value for point in series.points for value in (point.value, point.low, point.high) if value is not None]
    middle = series.levels[-1].value if series.levels else series.points[-1].value
    span = _LEAST_SPAN_OF_SHARE if series.is_share else _LEAST_SPAN * abs(middle)
    return scale_around([*values, middle - span / 2, middle + span / 2], BOTTOM, TOP)


def _days(points: Sequence[Point], x: Scale) -> str:
    """Dates of up to four nights below the axis."""
    count = min(4, len(points))
    chosen = {round(place * (len(points) - 1) / max(1, count - 1)) for place in range(count)}
    parts = [line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis")]
    for place in sorted(chosen):
        at = x(points[place].night)
        last = place == len(points) - 1 and len(points) > 1
        anchor = "end" if last else "start" if place == 0 and len(points) > 1 else "middle"
        parts += [line(at, BOTTOM, at, BOTTOM + 4, "axis")]
        parts += [text(at + (8 if last else 0), BOTTOM + 19, points[place].started[5:10], "tick", anchor)]
    return Markup().join(parts)


def _tick(metric: Metric, value: float) -> str:
    """Without the unit where that is long: the heading's value has it."""
    return significant(value) if metric.style in ("rate", "plain") else format_value(metric, value)


def _band(points: Sequence[Point], x: Scale, y: Scale) -> str:
    """The intervals as one area for each stretch of nights that have them."""
    parts = []
    stretch: list[Point] = []
    for point in [*points, None]:
        if point is not None and point.low is not None and point.high is not None:
            stretch.append(point)
        elif stretch:
            corners = [(x(one.night), y(one.high or 0.0)) for one in stretch]
            corners += [(x(one.night), y(one.low or 0.0)) for one in reversed(stretch)]
            path = " ".join(f"{number(across)},{number(down)}" for across, down in corners)
            parts.append(element("polygon", {"points": path, "class": "band"}))
            stretch = []
    return Markup().join(parts)


def _level(series: Series, level: Level, x: Scale, y: Scale) -> str:
    first, last = series.usable[level.first].night, series.usable[level.last].night
    return line(x(first - 0.4), y(level.value), x(last + 0.4), y(level.value), "level")


def _changes(series: Series, nights: Mapping[int, Night], x: Scale) -> list[str]:
    """A mark at the first night of each new level, with its size above; labels that would meet take a second row."""
    parts = []
    ends = [-1e9, -1e9]
    for change in level_changes(series, nights):
        at = x(change.first - 0.5)
        middle = min(max(at, LEFT + _LABEL_WIDTH / 2), RIGHT - _LABEL_WIDTH / 2)
        row = 0 if middle - _LABEL_WIDTH / 2 >= ends[0] else 1
        ends[row] = middle + _LABEL_WIDTH / 2
        down = TOP - 10 - 16 * row
        told = [f"{change.words} since {change.since}", change.values, *change.new.split("; ")]
        parts.append(
            element(
                "g",
                {"class": f"change {change.state}", "tabindex": "0"},
                line(at, down + 4, at, BOTTOM, "mark"),
                text(middle, down, change.words, "size"),
                title("\n".join(filter(None, told))),
            )
        )
    return parts


def _point(
    series: Series, point: Point, nights: Mapping[int, Night], failed: bool, x: Scale, y: Scale, small: bool
) -> str:
    metric = series.described
    interval = format_interval(metric, point.low, point.high)
    words = f"{_label(nights, point.night)}\n{format_value(metric, point.value)}" + (
        f" ({interval})" if interval else ""
    )
    words += "\nthe gate failed" if failed else ""
    disturbed = point not in series.usable
    words += "\nthe machine was too disturbed: not judged" if disturbed else ""
    radius = (4.5 if failed else 1.8) if small else (5.5 if failed else 3.0)
    dot: dict[str, Attribute] = {"cx": x(point.night), "cy": y(point.value), "r": radius, "class": "mark"}
    return element(
        "g",
        {"class": f"point{' failed' if failed else ''}{' disturbed' if disturbed else ''}", "tabindex": "-1"},
        element("circle", dot),
        title(words),
    )
