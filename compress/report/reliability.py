"""Reliability diagram: whether answers are right as often as their probabilities say."""

from __future__ import annotations

import math

from compress.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, shape
from compress.report.markup import element
from compress.report.schema import CalibrationCurve, Report
from compress.report.svg import Axis, Scale, chart, line, polyline, text, title, x_axis, y_axis


def reliability_diagram(report: Report, target: str) -> str | None:
    """The share of right answers against their mean probability, bin by bin; None where that was not kept."""
    curves = [curve for curve in report.calibration if curve.target == target and curve.bins]
    if not curves:
        return None
    least = min(min(bin.confidence, bin.accuracy) for curve in curves for bin in curve.bins)
    low = math.floor(least * 10) / 10 if least < 1 else 0.9
    x = Axis(Scale(low, 1.0, LEFT, RIGHT), "Probability of the answer", _percent)
    y = Axis(Scale(low, 1.0, BOTTOM, TOP), "Right answers", _percent)
    parts = [x_axis(x, TOP, BOTTOM), y_axis(y, LEFT, RIGHT), line(LEFT, BOTTOM, RIGHT, TOP, "front")]
    parts += [_series(curve, x.scale, y.scale, place) for place, curve in enumerate(curves)]
    models = " and ".join(curve.model for curve in curves)
    return chart(WIDTH, HEIGHT, f"Share of right answers by their probability, {models}", *parts)


def _percent(value: float) -> str:
    return f"{value * 100:.0f}%"


def _series(curve: CalibrationCurve, x: Scale, y: Scale, place: int) -> str:
    total = sum(bin.rows for bin in curve.bins)
    parts = [polyline([(x(bin.confidence), y(bin.accuracy)) for bin in curve.bins], "curve")]
    for bin in curve.bins:
        tip = (
            f"{curve.model}: {bin.rows} of {total} answers\n"
            f"probability {bin.confidence * 100:.1f}%, right {bin.accuracy * 100:.1f}%"
        )
        size = 3.0 + 5.0 * math.sqrt(bin.rows / total)
        mark = shape(curve.model, x(bin.confidence), y(bin.accuracy), size)
        parts.append(element("g", {"class": f"point {curve.model}", "tabindex": "0"}, mark, title(tip)))
    # The lower right corner is empty unless a model is far too sure of itself.
    parts.append(text(RIGHT - 8, BOTTOM - 34 + 18 * place, curve.model, f"label {curve.model}", "end"))
    return element("g", {"class": f"series {curve.model}"}, *parts)
