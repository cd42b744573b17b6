"""Drift of use for people: a table in a terminal, a page with a chart for each test."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from compress.plugins.monitoring.ab import AbReport, JudgedQuantity
from compress.plugins.monitoring.record import ChangedPart, DriftReport, DriftTest
from compress.report.pages import render
from compress.report.plot import SMALL, Plot, Scale, with_tooltip
from compress.results.formatting import format_bytes, format_number
from compress.utils.responsive_table import ResponsiveTable, TableColumn

_STYLES = {"drift": "bold red", "small": "yellow", "none": "", "not judged": "dim"}
_CHIPS = {"drift": "missed", "small": "unknown", "none": "passed", "not judged": ""}


def console_drift(report: DriftReport) -> RenderableType:
    """Return a table with a line for each test, then what changed most and the advice."""
    columns = [TableColumn(""), TableColumn("test")]
    columns += [TableColumn("reference", right=True), TableColumn("recent", right=True)]
    columns += [TableColumn("effect", right=True, rank=2), TableColumn("p", right=True, rank=1), TableColumn("verdict")]
    table = ResponsiveTable("", columns, "hidden at this width; see --json")
    for test in report.tests:
        values = value_text(test, test.reference), value_text(test, test.recent)
        figures = effect_text(test), p_text(test.adjusted)
        table.add(SIGNS[test.verdict], test.title, *values, *figures, test.verdict, style=_STYLES[test.verdict])
    sides = f"{report.recent.name} ({report.recent.rows:,} rows) against {report.reference.name}"
    parts: list[RenderableType] = [Text(f"{sides} ({report.reference.rows:,})", style="dim"), table]
    # Details follow for drifts only.
    for test in report.having("drift"):
        changed = [part for part in test.parts if part.p_value is None or part.p_value <= 0.05][:5]
        parts += [Text(f"{test.title}:")] if changed else []
        for part in changed:
            reference, recent = part_texts(test, part)
            note = f" ({part.note})" if part.note else ""
            parts.append(Text(f"  {part.name}: {reference} \u2192 {recent}{note}"))
    parts += [Text(f"to do ({titles}): {advice}") for titles, advice in report.advice]
    parts += [Text(f"{test.title} not judged: {test.why}", style="dim") for test in report.having("not judged")]
    parts += [Text(note, style="dim") for note in (*report.notes, method_text(report))]
    return Group(*parts, Text(f"{report.sentence}."))


def html_drift(report: DriftReport) -> str:
    """Return the HTML page, which loads nothing from elsewhere."""
    return render(
        "plugins/monitoring/templates/drift.html",
        "Drift of use",
        report.model_dump_json(),
        report=report,
        words={function.__name__: function for function in (value_text, effect_text, p_text, part_texts, method_text)},
        chips=_CHIPS,
        chart=curves,
    )


def curves(test: DriftTest) -> str | None:
    """Return a chart of both distribution functions: the share of rows with at most a value."""
    if test.quantiles is None:
        return None
    reference, recent = test.quantiles
    low, high = min(reference[0], recent[0]), max(reference[-1], recent[-1])
    # Constant values have no distribution to draw.
    if not high > low:
        return None
    scale = 100 if test.unit == "ratio" else 1
    plot = Plot(SMALL, Scale(low * scale, high * scale, SMALL.left, SMALL.right), Scale(0, 1, SMALL.bottom, SMALL.top))
    plot.y_axis("share of rows with at most that much", lambda value: f"{value:.0%}")
    plot.x_axis("%" if test.unit == "ratio" else test.unit, lambda value: format_number(value))
    labels = []
    for css, name, values in (("baseline", "reference", reference), ("final", "recent", recent)):
        # The k-th of n + 1 evenly spaced quantiles is the value below which k / n of the rows lie.
        points = [(value * scale, index / (len(values) - 1)) for index, value in enumerate(values)]
        plot.add(with_tooltip(f"series {css}", name, plot.line(points, "curve")))
        # Place the two labels at different heights, so that they do not overlap where the curves do.
        labels.append((points[len(points) // 3 if css == "baseline" else 2 * len(points) // 3], name, f"label {css}"))
    plot.labels(labels)
    return plot.svg(f"{test.title}: distribution of the reference and of the recent rows")


_VERDICTS = {"worse": "bold red", "better": "green", "same": "", "can't tell": "yellow"}


def console_ab(report: AbReport) -> RenderableType:
    """Return a table with a line for each quantity, and the observation after which its verdict was known."""
    columns = [TableColumn("of B against A"), *(TableColumn(name, right=True) for name in ("A", "B", "change"))]
    columns += [TableColumn("interval", right=True, rank=1), TableColumn("verdict")]
    columns += [TableColumn("decided after", right=True, rank=2)]
    table = ResponsiveTable("", columns, "hidden at this width; see --json")
    for quantity in report.judged:
        seen = f"{quantity.observations:,}"
        decided = f"{quantity.decided_after:,} of {seen}" if quantity.decided_after else f"undecided, {seen} seen"
        change = change_text(quantity.change, quantity.unit), span_text(quantity)
        values = amount_text(quantity.a, quantity.unit), amount_text(quantity.b, quantity.unit)
        table.add(quantity.name, *values, *change, quantity.verdict, decided, style=_VERDICTS[quantity.verdict])
    lines = [
        f"A: {report.a}",
        f"B: {report.b}",
        f"{report.requests:,} requests, {report.labeled:,} of them with a label",
    ]
    if report.agreement is not None:
        lines.append(f"both give the same answer to {report.agreement:.1%}")
    about = f"a verdict on equally good models is wrong in at most {report.level:.0%} of cases, whenever you look"
    return Group(
        *(Text(line, style="dim") for line in lines),
        table,
        *(Text(note, style="dim") for note in (*report.notes, about)),
        Text(f"{report.sentence}."),
    )


SIGNS = {"drift": "\u2717", "small": "\u00b7", "none": "\u2713", "not judged": "?"}


def value_text(test: DriftTest, value: float | None) -> str:
    """Return a value with its unit, such as `3.2%` or `41 tokens`."""
    return amount_text(value, test.unit)


def p_text(value: float | None) -> str:
    """Return a p-value, such as `0.0031` or `< 0.0001`."""
    if value is None:
        return ""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def effect_text(test: DriftTest) -> str:
    """Return an effect with two digits."""
    return "" if test.effect is None else format_number(test.effect, 2)


def part_texts(test: DriftTest, part: ChangedPart) -> tuple[str, str]:
    """Return both values of a part."""
    share = test.name != "ranges" or test.unit == "ratio"
    both = part.reference, part.recent
    reference, recent = (f"{format_number(100 * value)}%" if share else format_number(value) for value in both)
    return reference, recent


def method_text(report: DriftReport) -> str:
    """Return how verdicts are made."""
    return (
        f"p-values of all tests are corrected together (Holm 1979); below {report.level:g} it is a drift where the "
        "effect matters, else a small one"
    )


def amount_text(value: float | None, unit: str) -> str:
    """Return a value with its unit, such as `84.2%`, `3.1 ms` or `19.4 MB`."""
    if value is None:
        return ""
    if unit == "bytes":
        return format_bytes(value)
    return f"{format_number(100 * value)}%" if unit == "ratio" else f"{format_number(value)} {unit}".strip()


def change_text(value: float | None, unit: str) -> str:
    """Return a change, in points for shares and otherwise in percent."""
    if value is None:
        return ""
    return f"{100 * value:+.2g}" + (" points" if unit == "ratio" else "%")


def span_text(quantity: JudgedQuantity) -> str:
    """Return the interval of a change, or nothing while it is unbounded."""
    if quantity.low is None or quantity.high is None:
        return ""
    return f"{100 * quantity.low:+.2g} to {change_text(quantity.high, quantity.unit)}"
