"""The words and figures in which drift of use is told."""

from __future__ import annotations

from compress.plugins.monitoring.ab import JudgedQuantity
from compress.plugins.monitoring.record import DriftTest, ChangedPart, DriftReport
from compress.results.formatting import format_bytes, format_number

SIGNS = {"drift": "\u2717", "small": "\u00b7", "none": "\u2713", "not judged": "?"}


def value_text(look: DriftTest, value: float | None) -> str:
    """`3.2%`, `41 tokens`; nothing where no number is told."""
    if value is None:
        return ""
    if look.unit == "ratio":
        return f"{format_number(100 * value)}%"
    return f"{format_number(value)} {look.unit}".strip()


def p_text(value: float | None) -> str:
    """`0.0031`, `< 0.0001`."""
    if value is None:
        return ""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def effect_text(look: DriftTest) -> str:
    """`0.31`."""
    return "" if look.effect is None else format_number(look.effect, 2)


def part_texts(look: DriftTest, part: ChangedPart) -> tuple[str, str]:
    """What a part was and is."""
    share = look.name != "ranges" or look.unit == "ratio"
    both = part.reference, part.recent
    before, now = (f"{format_number(100 * value)}%" if share else format_number(value) for value in both)
    return before, now


def method_text(report: DriftReport) -> str:
    """How the verdicts were made."""
    return (
        f"p-values of all looks are corrected together (Holm 1979); below {report.level:g} it is a drift where the "
        "effect matters, else a small one"
    )


def amount_text(value: float | None, unit: str) -> str:
    """`84.2%`, `3.1 ms`, `19.4 MB`."""
    if value is None:
        return ""
    if unit == "bytes":
        return format_bytes(value)
    return f"{format_number(100 * value)}%" if unit == "ratio" else f"{format_number(value)} {unit}"


def change_text(value: float | None, unit: str) -> str:
    """`-3.1 points` of a share, else `+12%`."""
    if value is None:
        return ""
    return f"{100 * value:+.2g}" + (" points" if unit == "ratio" else "%")


def span_text(one: JudgedQuantity) -> str:
    """From the least to the greatest change that may be so; nothing while it may be any."""
    if one.low is None or one.high is None:
        return ""
    return f"{100 * one.low:+.2g} to {change_text(one.high, one.unit)}"
