"""Quality against a cost, for every model of the run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from compress.measurement import Measurement
from compress.metrics import Metric, describe_metric, format_measurement, format_value, shortest_context, significant
from compress.report.labels import Box, Placed, place_labels
from compress.report.markup import element
from compress.report.schema import BASELINE, FINAL, Report
from compress.report.svg import Axis, Scale, chart, line, polyline, scale_around, text, title, x_axis, y_axis

WIDTH, HEIGHT = 480.0, 350.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 466.0, 34.0, 298.0


@dataclass(frozen=True)
class Point:
    """One or several models at the same place."""

    models: tuple[str, ...]
    cost: Measurement
    quality: Measurement

    @property
    def label(self) -> str:
        """`quantize = final` where a model is measured twice."""
        return " = ".join(self.models)

    @property
    def css_class(self) -> str:
        """`final` and `baseline` are emphasised."""
        return FINAL if FINAL in self.models else BASELINE if BASELINE in self.models else "step"


def trade_off(report: Report, target: str, quality: Metric, cost: Metric) -> str | None:
    """An SVG chart of ``quality`` with its interval against ``cost`` (log axis); None below two models."""
    points = _points(report, target, quality, cost)
    if len({model for point in points for model in point.models}) < 2:
        return None
    x = Axis(_cost_scale(points), _cost_title(cost), lambda value: _cost_tick(cost, value), 5)
    y = Axis(_quality_scale(points), quality.title, lambda value: _tick(quality, value))
    points = _merge(points, x.scale, y.scale)
    front = [(x.scale(p.cost.value), y.scale(p.quality.value)) for p in pareto(points, quality.better == "higher")]
    label = f"{quality.title} against {cost.title.lower()} of {len(points)} models"
    parts = [x_axis(x, TOP, BOTTOM), y_axis(y, LEFT, RIGHT), polyline(front, "front")]
    parts += [_mark(point, x.scale, y.scale) for point in points]
    return chart(WIDTH, HEIGHT, label, *parts, *_labels(points, x.scale, y.scale, front))


def _points(report: Report, target: str, quality: Metric, cost: Metric) -> list[Point]:
    pairs = [
        (model, report.find(model, cost.name, target), report.find(model, quality.name, target))
        for model in report.models
    ]
    return [Point((model,), c, q) for model, c, q in pairs if c is not None and q is not None and c.value > 0]


def _cost_title(cost: Metric) -> str:
    return f"{cost.title} at batch 1 (log scale)" if cost.name == "latency_ms" else f"{cost.title} (log scale)"


def _ends(row: Measurement) -> tuple[float, float]:
    return (row.value, row.value) if row.low is None or row.high is None else (row.low, row.high)


def _cost_scale(points: Sequence[Point]) -> Scale:
    values = [value for point in points for value in _ends(point.cost) if value > 0]
    return scale_around(values, LEFT, RIGHT, logarithmic=True, margin=0.12)


def _quality_scale(points: Sequence[Point]) -> Scale:
    return scale_around([value for point in points for value in _ends(point.quality)], BOTTOM, TOP, margin=0.1)


def _cost_tick(cost: Metric, value: float) -> str:
    return f"{value:g} ms" if cost.style == "milliseconds" else format_value(cost, value).replace(".0 ", " ")


def _tick(quality: Metric, value: float) -> str:
    if quality.style != "percent":
        return significant(value)
    return f"{value if quality.unit == '%' else value * 100:.1f}".removesuffix(".0") + "%"


def _merge(points: Sequence[Point], x: Scale, y: Scale) -> list[Point]:
    """Join neighbours that would cover one another: `final` repeats the last stage's artifact."""
    merged: list[Point] = []
    for point in points:
        for place, other in enumerate(merged):
            apart = (
                x(point.cost.value) - x(other.cost.value),
                y(point.quality.value) - y(other.quality.value),
            )
            if max(map(abs, apart)) < 1.5:
                merged[place] = Point(other.models + point.models, other.cost, other.quality)
                break
        else:
            merged.append(point)
    return merged


def pareto(points: Sequence[Point], higher: bool) -> list[Point]:
    """The points that no other beats in both, by rising cost."""
    front: list[Point] = []
    sign = 1 if higher else -1
    for point in sorted(points, key=lambda p: (p.cost.value, -sign * p.quality.value)):
        if not front or sign * point.quality.value > sign * front[-1].quality.value:
            front.append(point)
    return front


def _mark(point: Point, x: Scale, y: Scale) -> str:
    """A point's shape over its interval bars, with its tooltip."""
    cx, cy = x(point.cost.value), y(point.quality.value)
    parts = []
    if point.quality.low is not None and point.quality.high is not None:
        parts += _bar(cx, y(point.quality.low), cx, y(point.quality.high))
    if point.cost.low is not None and point.cost.high is not None and point.cost.low > 0:
        parts += [line(x(point.cost.low), cy, x(point.cost.high), cy, "interval")]
    rows = f"{format_measurement(point.quality)}\n{format_measurement(point.cost)}"
    parts += [shape(point.css_class, cx, cy), title(f"{point.label}\n{rows}")]
    return element("g", {"class": f"point {point.css_class}", "tabindex": "0"}, *parts)


def _bar(x1: float, y1: float, x2: float, y2: float) -> list[str]:
    caps = [line(x1 - 4, y, x1 + 4, y, "interval") for y in (y1, y2)]
    return [line(x1, y1, x2, y2, "interval"), *caps]


def shape(css_class: str, x: float, y: float, size: float = 5.5) -> str:
    """A square for the baseline, a diamond for the final model, a dot for any other."""
    if css_class == BASELINE:
        corner = {"x": x - size, "y": y - size, "width": 2 * size, "height": 2 * size, "rx": 1.5}
        return element("rect", {**corner, "class": "mark"})
    if css_class == FINAL:
        d = size * 1.4
        return element(
            "path",
            {
                "d": f"M{x:.2f} {y - d:.2f}l{d:.2f} {d:.2f}l{-d:.2f} {d:.2f}l{-d:.2f} {-d:.2f}z",
                "class": "mark",
            },
        )
    return element("circle", {"cx": x, "cy": y, "r": size - 1, "class": "mark"})


def _labels(points: Sequence[Point], x: Scale, y: Scale, front: Sequence[tuple[float, float]]) -> list[str]:
    ordered = sorted(points, key=lambda point: point.css_class == "step")
    places = [(x(point.cost.value), y(point.quality.value)) for point in ordered]
    bars = [
        Box(cx - 5, y(_ends(p.quality)[1]), cx + 5, y(_ends(p.quality)[0]))
        for (cx, _), p in zip(places, ordered, strict=True)
    ]
    placed = place_labels(
        places, [p.label for p in ordered], Box(LEFT, TOP - 2, RIGHT + 10, BOTTOM), [*bars, *_along(front)]
    )
    parts = []
    for point, (cx, cy), spot in zip(ordered, places, placed, strict=True):
        parts += _label(point, cx, cy, spot)
    return parts


def _along(front: Sequence[tuple[float, float]], step: float = 6.0) -> list[Box]:
    """Small boxes on the line, for labels to keep clear of."""
    boxes = []
    for (x1, y1), (x2, y2) in pairwise(front):
        count = max(1, round(math.dist((x1, y1), (x2, y2)) / step))
        for i in range(count + 1):
            x, y = x1 + (x2 - x1) * i / count, y1 + (y2 - y1) * i / count
            boxes.append(Box(x - 2, y - 2, x + 2, y + 2))
    return boxes


def _label(point: Point, cx: float, cy: float, spot: Placed) -> list[str]:
    box = spot.box
    words = text((box.left + box.right) / 2, box.bottom - 4, point.label, f"label {point.css_class}")
    if not spot.led:
        return [words]
    nearest = (min(max(cx, box.left), box.right), min(max(cy, box.top), box.bottom))
    return [line(cx, cy, nearest[0], nearest[1], "leader"), words]


def cost_metrics(report: Report, target: str) -> list[Metric]:
    """The costs that quality is drawn against: size and latency, or the time a token takes, where measured."""
    units = report.metrics(target)
    names = ("size_bytes", "latency_ms", f"time_per_output_token_ms_context_{shortest_context(units)}")
    return [describe_metric(name, units[name]) for name in names if name in units]
