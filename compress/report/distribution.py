"""How latency is spread: over single calls, and over sequence lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

from compress.measurement import Measurement
from compress.metrics import describe_metric, format_measurement, format_value, improvement, length_bucket
from compress.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, shape
from compress.report.markup import element
from compress.report.schema import BASELINE, FINAL, Report
from compress.report.svg import Axis, Scale, chart, line, polyline, scale_around, text, title, x_axis, y_axis

STEPS = 120
"""Points that a curve is thinned to."""


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the sorted samples lie, interpolated between neighbours."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def latency_curves(report: Report, target: str) -> str | None:
    """Share of the calls answered within a time, baseline and final; None without raw samples."""
    rows = [report.find(model, "latency_ms", target) for model in (BASELINE, FINAL)]
    known = [row for row in rows if row is not None and row.raw and len(row.raw) > 1 and min(row.raw) > 0]
    if not known:
        return None
    samples = {row.model: sorted(row.raw or ()) for row in known}
    spread = [percentile(values, share) for values in samples.values() for share in (0.0, 0.995)]
    x = Axis(scale_around(spread, LEFT, RIGHT, True, 0.06), "Latency at batch 1 (log scale)", _milliseconds)
    y = Axis(Scale(0, 1, BOTTOM, TOP), "Calls answered within", lambda value: f"{value * 100:.0f}%")
    parts = [x_axis(x, TOP, BOTTOM), y_axis(y, LEFT, RIGHT)]
    parts += [_curve(row, samples[row.model], x.scale, y.scale) for row in known]
    counts = " and ".join(f"{len(values)} calls of {model}" for model, values in samples.items())
    return chart(WIDTH, HEIGHT, f"Distribution of latency over {counts}", *parts)


def _milliseconds(value: float) -> str:
    return f"{value:g} ms"


def _curve(row: Measurement, ordered: Sequence[float], x: Scale, y: Scale) -> str:
    """The empirical distribution, with its median marked and written."""
    count = min(STEPS, len(ordered) - 1)
    curve = [(x(percentile(ordered, i / count)), y(i / count)) for i in range(count + 1)]
    median = percentile(ordered, 0.5)
    metric = describe_metric(row.metric, row.unit)
    tail = ", ".join(f"p{share} {format_value(metric, percentile(ordered, share / 100))}" for share in (50, 90, 99))
    side, anchor = (1, "start") if x(median) < (LEFT + RIGHT) / 2 else (-1, "end")
    at = x(median) + side * 12
    parts = [
        polyline(curve, "curve"),
        shape(row.model, x(median), y(0.5)),
        text(at, y(0.5) + 16, row.model, f"label {row.model}", anchor),
        text(at, y(0.5) + 32, format_value(metric, median), "label", anchor),
        title(f"{row.model}: {tail} ({len(ordered)} calls)"),
    ]
    return element("g", {"class": f"series {row.model}", "tabindex": "0"}, *parts)


def latency_by_length(report: Report, target: str) -> str | None:
    """Median latency with its interval for each range of sequence lengths; None if it was not measured."""
    buckets = sorted({bucket for name in report.metrics(target) if (bucket := length_bucket(name))})
    series = {model: _by_bucket(report, model, target, buckets) for model in (BASELINE, FINAL)}
    rows = [row for found in series.values() for row in found.values() if row.value > 0]
    if not rows:
        return None
    ends = [value for row in rows for value in (row.value, row.low or row.value, row.high or row.value)]
    y = Axis(scale_around(ends, BOTTOM, TOP, True, 0.1), "Median latency (log scale)", _milliseconds)
    step = (RIGHT - LEFT) / len(buckets)
    centres = {bucket: LEFT + step * (place + 0.5) for place, bucket in enumerate(buckets)}
    parts = [y_axis(y, LEFT, RIGHT), line(LEFT, BOTTOM, RIGHT, BOTTOM, "axis")]
    parts += [_series(model, found, centres, y.scale) for model, found in series.items() if found]
    for bucket, centre in centres.items():
        parts.append(text(centre, BOTTOM + 18, f"{bucket[0]}\u2013{bucket[1]}", "tick"))
        parts.append(text(centre, BOTTOM + 33, _gain(series, bucket), "gain"))
    parts.append(text((LEFT + RIGHT) / 2, BOTTOM + 49, "Tokens in the sentence", "axis-title"))
    return chart(WIDTH, HEIGHT, f"Median latency by sequence length, in {len(buckets)} ranges", *parts)


def _by_bucket(
    report: Report, model: str, target: str, buckets: Sequence[tuple[int, int]]
) -> dict[tuple[int, int], Measurement]:
    rows = {bucket: report.find(model, f"latency_ms_length_{bucket[0]}_{bucket[1]}", target) for bucket in buckets}
    return {bucket: row for bucket, row in rows.items() if row is not None}


def _gain(series: dict[str, dict[tuple[int, int], Measurement]], bucket: tuple[int, int]) -> str:
    before, after = series[BASELINE].get(bucket), series[FINAL].get(bucket)
    if before is None or after is None:
        return ""
    return improvement(describe_metric("latency_ms"), after.value, before.value).removesuffix(" faster")


def _series(
    model: str, found: dict[tuple[int, int], Measurement], centres: dict[tuple[int, int], float], y: Scale
) -> str:
    places = [(centres[bucket], y(row.value)) for bucket, row in found.items()]
    parts = [polyline(places, "curve")]
    for (x, middle), row in zip(places, found.values(), strict=True):
        bars = [line(x, y(row.low), x, y(row.high), "interval")] if row.low is not None and row.high is not None else []
        tip = title(f"{model}, {describe_metric(row.metric).title}\n{format_measurement(row)} (n = {row.n})")
        parts.append(element("g", {"class": f"point {model}", "tabindex": "0"}, *bars, shape(model, x, middle), tip))
    last = places[-1]
    parts.append(text(last[0], last[1] - 13, model, f"label {model}", "middle"))
    return element("g", {"class": f"series {model}"}, *parts)
