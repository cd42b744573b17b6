"""Charts of a report: quality against cost, distribution of latency, calibration, and quality by slice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from compress.report.plot import CHARACTER, SMALL, Frame, Plot, Scale, element, scale_around, shape, text, with_tooltip
from compress.report.slices import ALL, slice_results
from compress.results.formatting import format_improvement, format_measurement, format_number, format_value
from compress.results.metrics import Metric, describe_metric, length_range_of, quality_metric, shortest_context
from compress.results.report import BASELINE, FINAL, Measurement, Report

_CURVE = 120
"""Number of points of a curve."""
_SLICES = Frame(480.0, 0.0, 156.0, 466.0, 14.0, 0.0)
_SLICE = 30.0


@dataclass(frozen=True)
class TradeOffPoint:
    """Cost and quality of one model, or of several models at the same position."""

    models: tuple[str, ...]
    cost: Measurement
    quality: Measurement
    steps: Measurement | None = None
    """Number of denoising steps, for image generation."""

    @property
    def label(self) -> str:
        """Return `quantize = final` for a model that is measured twice, `distill, 4 steps` for image generation."""
        return " = ".join(self.models) + (f", {self.steps.value:.0f} steps" if self.steps else "")

    @property
    def kind(self) -> str:
        """Return the kind of mark; `final` and `baseline` are emphasised."""
        return FINAL if FINAL in self.models else BASELINE if BASELINE in self.models else "step"

    @property
    def place(self) -> tuple[float, float]:
        """Return cost and quality."""
        return self.cost.value, self.quality.value


def cost_metrics(report: Report, target: str) -> list[Metric]:
    """Return the costs that quality is plotted against: size, and latency or the time of a token."""
    units = report.metrics(target)
    names = ("size_bytes", "latency_ms", f"time_per_output_token_ms_context_{shortest_context(units)}")
    return [describe_metric(name, units[name]) for name in names if name in units]


def quality_metrics(report: Report, target: str) -> list[Metric]:
    """Return the qualities that are plotted against costs: the task's own metric, and the Fréchet distance."""
    units = report.metrics(target)
    task_metric = quality_metric(units)
    names = [] if task_metric is None else [task_metric.name]
    names += [name for name in ("frechet_distance",) if name in units and name not in names]
    return [describe_metric(name, units[name]) for name in names]


def trade_off(report: Report, target: str, quality: Metric, cost: Metric) -> str | None:
    """Return a chart of quality with its interval against a cost on a logarithmic axis, or None below two models.

    Args:
        report: Report of the run.
        target: Target of the measurements.
        quality: Metric of the y axis.
        cost: Metric of the x axis.
    """
    pairs = [
        (model, report.find(model, cost.name, target), report.find(model, quality.name, target))
        for model in report.models
    ]
    points = [
        TradeOffPoint((model,), c, q, report.find(model, "sampling_steps", target))
        for model, c, q in pairs
        if c is not None and q is not None and c.value > 0
    ]
    if len(points) < 2:
        return None
    x = scale_around(
        [end for point in points for end in _ends(point.cost) if end > 0], SMALL.left, SMALL.right, True, 0.12
    )
    y = scale_around([end for point in points for end in _ends(point.quality)], SMALL.bottom, SMALL.top, margin=0.1)
    plot = Plot(SMALL, x, y)
    plot.x_axis(
        f"{cost.title}{' at batch 1' * (cost.name == 'latency_ms')} (log scale)", lambda value: _tick(cost, value)
    )
    plot.y_axis(quality.title, lambda value: _tick(quality, value))
    points = _merged(points, plot)
    plot.add(plot.line([point.place for point in pareto(points, quality.better == "higher")], "front"))
    for point in points:
        tip = "\n".join([point.label, format_measurement(point.quality), format_measurement(point.cost)])
        across = _interval(point.cost)
        across = across if across and across[0] > 0 else None
        plot.add(plot.mark(point.kind, point.place, tip, across=across, up=_interval(point.quality)))
    ordered = sorted(points, key=lambda point: point.kind == "step")
    plot.labels([(point.place, point.label, f"label {point.kind}") for point in ordered])
    return plot.svg(f"{quality.title} against {cost.title.lower()} of {len(points)} models")


def pareto(points: Sequence[TradeOffPoint], higher: bool) -> list[TradeOffPoint]:
    """Return the points that no other point beats in both cost and quality, by ascending cost."""
    front: list[TradeOffPoint] = []
    sign = 1 if higher else -1
    for point in sorted(points, key=lambda point: (point.cost.value, -sign * point.quality.value)):
        if not front or sign * point.quality.value > sign * front[-1].quality.value:
            front.append(point)
    return front


def _merged(points: Sequence[TradeOffPoint], plot: Plot) -> list[TradeOffPoint]:
    """Return points with coinciding marks as one: `final` repeats the last stage's model."""
    merged: list[TradeOffPoint] = []
    for point in points:
        for index, other in enumerate(merged):
            if max(abs(a - b) for a, b in zip(plot.at(point.place), plot.at(other.place), strict=True)) < 1.5:
                merged[index] = replace(other, models=other.models + point.models)
                break
        else:
            merged.append(point)
    return merged


def _interval(row: Measurement) -> tuple[float, float] | None:
    return None if row.low is None or row.high is None else (row.low, row.high)


def _ends(row: Measurement) -> tuple[float, float]:
    return _interval(row) or (row.value, row.value)


def _tick(metric: Metric, value: float) -> str:
    """Return a value of the metric as short text."""
    match metric.style:
        case "milliseconds":
            return f"{value:g} ms"
        case "percent":
            return f"{value if metric.unit == '%' else value * 100:.1f}".removesuffix(".0") + "%"
        case "plain":
            return format_number(value)
        case _:
            return format_value(metric, value).replace(".0 ", " ")


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which ``share`` of the sorted samples lie, interpolated linearly."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def latency_curves(report: Report, target: str) -> str | None:
    """Return the cumulative distribution of latency of baseline and final model, or None without raw samples."""
    rows = [report.find(model, "latency_ms", target) for model in (BASELINE, FINAL)]
    samples = {row.model: sorted(row.raw) for row in rows if row and row.raw and len(row.raw) > 1 and min(row.raw) > 0}
    if not samples:
        return None
    spread = [percentile(values, share) for values in samples.values() for share in (0.0, 0.995)]
    plot = Plot(SMALL, scale_around(spread, SMALL.left, SMALL.right, True, 0.06), Scale(0, 1, SMALL.bottom, SMALL.top))
    plot.x_axis("Latency at batch 1 (log scale)", lambda value: f"{value:g} ms")
    plot.y_axis("Calls answered within", _percent)
    metric = describe_metric("latency_ms")
    for model, ordered in samples.items():
        count = min(_CURVE, len(ordered) - 1)
        median, (x, y) = percentile(ordered, 0.5), plot.at((percentile(ordered, 0.5), 0.5))
        tail = ", ".join(f"p{share} {format_value(metric, percentile(ordered, share / 100))}" for share in (50, 90, 99))
        side, anchor = (12, "start") if x < (SMALL.left + SMALL.right) / 2 else (-12, "end")
        plot.add(
            with_tooltip(
                f"series {model}",
                f"{model}: {tail} ({len(ordered)} calls)",
                plot.line([(percentile(ordered, i / count), i / count) for i in range(count + 1)], "curve"),
                shape(model, x, y),
                text(x + side, y + 16, model, f"label {model}", anchor),
                text(x + side, y + 32, format_value(metric, median), "label", anchor),
            )
        )
    counts = " and ".join(f"{len(values)} calls of {model}" for model, values in samples.items())
    return plot.svg(f"Distribution of latency over {counts}")


def latency_by_length(report: Report, target: str) -> str | None:
    """Return median latency with its interval by range of sequence lengths, or None if it was not measured."""
    buckets = sorted({bucket for name in report.metrics(target) if (bucket := length_range_of(name))})
    names = [f"latency_ms_length_{low}_{high}" for low, high in buckets]
    series = {model: [report.find(model, name, target) for name in names] for model in (BASELINE, FINAL)}
    ends = [
        end for measurements in series.values() for row in measurements if row and row.value > 0 for end in _ends(row)
    ]
    if not ends:
        return None
    x = Scale(-0.5, len(buckets) - 0.5, SMALL.left, SMALL.right)
    plot = Plot(SMALL, x, scale_around(ends, SMALL.bottom, SMALL.top, True, 0.1))
    plot.y_axis("Median latency (log scale)", lambda value: f"{value:g} ms")
    plot.x_axis_line()
    for model, measurements in series.items():
        points = {(index, row.value): row for index, row in enumerate(measurements) if row is not None}
        if points:
            marks = [plot.line(list(points), "curve")]
            for at, row in points.items():
                tip = f"{model}, {describe_metric(row.metric).title}\n{format_measurement(row)} (n = {row.n})"
                marks.append(plot.mark(model, at, tip, up=_interval(row)))
            end_x, end_y = plot.at(list(points)[-1])
            label = text(end_x, end_y - 13, model, f"label {model}")
            plot.add(element("g", {"class": f"series {model}"}, *marks, label))
    for index, (low, high) in enumerate(buckets):
        baseline, final = series[BASELINE][index], series[FINAL][index]
        gain = (
            format_improvement(describe_metric("latency_ms"), final.value, baseline.value) if baseline and final else ""
        )
        plot.add(text(x(index), SMALL.bottom + 18, f"{low}\u2013{high}", "tick"))
        plot.add(text(x(index), SMALL.bottom + 33, gain.removesuffix(" faster"), "gain"))
    plot.add(text((SMALL.left + SMALL.right) / 2, SMALL.bottom + 49, "Tokens in the sentence", "axis-title"))
    return plot.svg(f"Median latency by sequence length, in {len(buckets)} ranges")


def reliability_diagram(report: Report, target: str) -> str | None:
    """Return the share of correct answers against their mean probability by bin, or None if it was not measured."""
    curves = [curve for curve in report.calibration if curve.target == target and curve.bins]
    if not curves:
        return None
    least = min(min(bin.confidence, bin.accuracy) for curve in curves for bin in curve.bins)
    low = math.floor(least * 10) / 10 if least < 1 else 0.9
    plot = Plot(SMALL, Scale(low, 1.0, SMALL.left, SMALL.right), Scale(low, 1.0, SMALL.bottom, SMALL.top))
    plot.x_axis("Probability of the answer", _percent)
    plot.y_axis("Right answers", _percent)
    plot.add(plot.line([(low, low), (1.0, 1.0)], "front"))
    for index, curve in enumerate(curves):
        # The lower right corner is empty unless a model is far too sure of itself.
        label = text(SMALL.right - 8, SMALL.bottom - 34 + 18 * index, curve.model, f"label {curve.model}", "end")
        total, marks = sum(bin.rows for bin in curve.bins), []
        for bin in curve.bins:
            tip = (
                f"{curve.model}: {bin.rows} of {total} answers\n"
                f"probability {bin.confidence * 100:.1f}%, right {bin.accuracy * 100:.1f}%"
            )
            size = 3.0 + 5.0 * math.sqrt(bin.rows / total)
            marks.append(plot.mark(curve.model, (bin.confidence, bin.accuracy), tip, size))
        plot.add(
            element(
                "g",
                {"class": f"series {curve.model}"},
                *[plot.line([(bin.confidence, bin.accuracy) for bin in curve.bins], "curve"), *marks],
                label,
            )
        )
    return plot.svg(f"Share of right answers by their probability, {' and '.join(curve.model for curve in curves)}")


def _percent(value: float) -> str:
    return f"{value * 100:.0f}%"


def slice_plot(report: Report, target: str) -> str | None:
    """Return a line for each slice with both models and their intervals, or None if nothing was measured by slice."""
    results = slice_results(report, target)
    if results is None:
        return None
    metric, slices = results
    bottom = _SLICES.top + _SLICE * len(slices)
    frame = Frame(_SLICES.width, bottom + 44, _SLICES.left, _SLICES.right, _SLICES.top, bottom)
    ends = [
        end for slice_result in slices for row in slice_result.measured.values() for end in (row.value, *_ends(row))
    ]
    x = scale_around(ends, frame.left, frame.right, margin=0.04)
    if metric.style == "percent" and x.high > 1 >= max(ends):
        x = Scale(x.low, 1.0, frame.left, frame.right)
    plot = Plot(frame, x, Scale(-0.5, len(slices) - 0.5, frame.top, bottom))
    share = metric.style == "percent"
    plot.x_axis(metric.title, lambda value: f"{value * 100:.4g}%" if share else f"{value:.4g}")
    max_characters = int((_SLICES.left - 10) / CHARACTER)
    for index, slice_result in enumerate(slices):
        name = slice_result.name
        plot.add(
            text(
                frame.left - 10,
                plot.y(index) + 4,
                name if len(name) <= max_characters else f"{name[: max_characters - 1]}\u2026",
                "label" if slice_result.name == ALL else "tick",
                "end",
            )
        )
        marks = []
        for (model, row), shift in zip(slice_result.measured.items(), (-5.5, 5.5), strict=False):
            tip = f"{model}, {slice_result.name}\n{format_measurement(row)}\n{row.n} rows" + (
                f": {slice_result.about}" if slice_result.about else ""
            )
            marks.append(plot.mark(model, (row.value, index), tip, 4.5, across=_interval(row), shift=shift))
        plot.add(*marks)
    return plot.svg(f"{metric.title} of {BASELINE} and {FINAL} in {len(slices) - 1} slices")
