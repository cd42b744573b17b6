"""Notation of numbers for people: values of metrics with units and intervals, sizes, counts and durations."""

from __future__ import annotations

import math
import re

from compress.results.metrics import Metric, describe_metric
from compress.results.report import Measurement

_NUMBER_AND_UNIT = re.compile(r"^(-?[\d,.]+)(.*)$")
_UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")
_DURATION = re.compile(r"\s*(?:\d+(?:\.\d+)?\s*[smh]\s*)+")


def format_number(value: float, digits: int = 3) -> str:
    """Return ``value`` with that many significant digits, without an exponent: 0.04123 -> 0.0412, 1234.5 -> 1,234."""
    if not math.isfinite(value):
        return "\u221e" if value == math.inf else "-\u221e" if value == -math.inf else "not a number"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return f"{value:,.{decimals}f}"


def format_value(metric: Metric, value: float) -> str:
    """Return ``value`` with its unit."""
    match metric.style:
        case "percent":
            return f"{value if metric.unit == '%' else value * 100:.2f}%"
        case "bytes":
            return format_bytes(value)
        case "count":
            return format_count(value)
        case "milliseconds":
            return format_seconds(value / 1000) if value >= 10_000 else f"{format_number(value)} ms"
        case "times":
            return f"{format_number(value)}x"
        case "rate" | "plain":
            return f"{format_number(value)} {metric.unit}".rstrip()


def format_interval(metric: Metric, low: float | None, high: float | None) -> str:
    """Return `85.84-88.76%` with the unit once, or nothing for an unknown interval."""
    if low is None or high is None:
        return ""
    low_text, high_text = format_value(metric, low), format_value(metric, high)
    number, unit = _NUMBER_AND_UNIT.match(low_text), _NUMBER_AND_UNIT.match(high_text)
    if number and unit and number[2] == unit[2]:
        low_text = number[1]
    return f"{low_text}\u2013{high_text}"


def format_measurement(row: Measurement) -> str:
    """Return value and interval of a measurement."""
    metric = describe_metric(row.metric, row.unit)
    interval = format_interval(metric, row.low, row.high)
    return format_value(metric, row.value) + (f" ({interval})" if interval else "")


def format_improvement(metric: Metric, value: float, reference: float) -> str:
    """Return ``value`` against ``reference``: `22.4x smaller`, `99.54%` for a quality, or nothing."""
    if metric.relative or reference == 0 or value == 0 or not (math.isfinite(value) and math.isfinite(reference)):
        return ""
    if metric.style == "percent":
        return f"{value / reference * 100:.2f}%"
    ratio = value / reference if metric.better != "lower" else reference / value
    if ratio <= 0:
        return ""
    if metric.better == "unknown":
        return f"{format_number(ratio)}x"
    if f"{ratio:.2f}" == "1.00":
        return "same"
    return f"{format_number(ratio)}x {metric.gain}" if ratio > 1 else f"{format_number(1 / ratio)}x {metric.loss}"


def format_bytes(value: float) -> str:
    """Return bytes in decimal units: 91,234,567 -> 91.2 MB."""
    return _scaled(value, (" B", " kB", " MB", " GB", " TB"))


def format_count(value: float) -> str:
    """Return a count in thousands, millions or billions: 22,713,986 -> 22.7 M."""
    return _scaled(value, ("", " K", " M", " B"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= 999.5 and power < len(units) - 1:
        value /= 1000
        power += 1
    return f"{value:,.0f}{units[0]}" if power == 0 else f"{format_number(value)}{units[power]}"


def format_seconds(value: float) -> str:
    """Return a duration: 45.3 s, 6 min 12 s, 2 h 05 min."""
    if value < 60:
        return f"{format_number(value)} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def parse_duration(text: str) -> float:
    """Return the seconds of `90s`, `60m` or `1h30m`. Raises `ValueError` for anything else."""
    if not _DURATION.fullmatch(text):
        raise ValueError("a time such as 90s, 60m or 1h30m")
    return sum(float(count) * _UNIT_SECONDS[unit] for count, unit in _DURATION_PART.findall(text))
