"""Formatting of the numbers of drift reports and comparisons."""

from __future__ import annotations

from compress.plugins.monitoring.ab import JudgedQuantity
from compress.plugins.monitoring.record import ChangedPart, DriftReport, DriftTest
from compress.results.formatting import format_bytes, format_number

SIGNS = {"drift": "\u2717", "small": "\u00b7", "none": "\u2713", "not judged": "?"}


def value_text(look: DriftTest, value: float | None) -> str:
    """Return a value with its unit, such as `3.2%` or `41 tokens`."""
    if value is None:
        return ""
    if look.unit == "ratio":
        return f"{format_number(100 * value)}%"
    return f"{format_number(value)} {look.unit}".strip()


def p_text(value: float | None) -> str:
    """Return a p-value, such as `0.0031` or `< 0.0001`."""
    if value is None:
        return ""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def effect_text(look: DriftTest) -> str:
    """Return an effect with two digits."""
    return "" if look.effect is None else format_number(look.effect, 2)


def part_texts(look: DriftTest, part: ChangedPart) -> tuple[str, str]:
    """Return both values of a part."""
    share = look.name != "ranges" or look.unit == "ratio"
    both = part.reference, part.recent
    reference, recent = (f"{format_number(100 * value)}%" if share else format_number(value) for value in both)
    return reference, recent


def method_text(report: DriftReport) -> str:
    """Return how verdicts are made."""
    return (
        f"p-values of all looks are corrected together (Holm 1979); below {report.level:g} it is a drift where the "
        "effect matters, else a small one"
    )


def amount_text(value: float | None, unit: str) -> str:
    """Return a value with its unit, such as `84.2%`, `3.1 ms` or `19.4 MB`."""
    if value is None:
        return ""
    if unit == "bytes":
        return format_bytes(value)
    return f"{format_number(100 * value)}%" if unit == "ratio" else f"{format_number(value)} {unit}"


def change_text(value: float | None, unit: str) -> str:
    """Return a change, in points for shares and otherwise in percent."""
    if value is None:
        return ""
    return f"{100 * value:+.2g}" + (" points" if unit == "ratio" else "%")


def span_text(one: JudgedQuantity) -> str:
    """Return the interval of a change, or nothing while it is unbounded."""
    if one.low is None or one.high is None:
        return ""
    return f"{100 * one.low:+.2g} to {change_text(one.high, one.unit)}"
