"""Drift of use for people: a table in a terminal, a page with a chart for each look."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.text import Text

from compress.plugins.monitoring import formatting
from compress.plugins.monitoring.ab import AbReport
from compress.plugins.monitoring.record import DriftReport, DriftTest
from compress.report.pages import render
from compress.report.plot import SMALL, Plot, Scale, with_tooltip
from compress.results.formatting import format_number
from compress.utils.responsive_table import ResponsiveTable, TableColumn

_STYLES = {"drift": "bold red", "small": "yellow", "none": "", "not judged": "dim"}
_CHIPS = {"drift": "missed", "small": "unknown", "none": "passed", "not judged": ""}
_SHOWN, _MAYBE = 5, 0.05


def console_drift(report: DriftReport) -> RenderableType:
    """Return a table with a line for each test, then what changed most and the advice."""
    columns = [
        TableColumn(""),
        TableColumn("look"),
        TableColumn("reference", right=True),
        TableColumn("recent", right=True),
    ]
    columns += [TableColumn("effect", right=True, rank=2), TableColumn("p", right=True, rank=1), TableColumn("verdict")]
    table = ResponsiveTable("", columns, "hidden at this width; see --json")
    for look in report.looks:
        values = formatting.value_text(look, look.reference), formatting.value_text(look, look.recent)
        figures = formatting.effect_text(look), formatting.p_text(look.adjusted)
        table.add(
            formatting.SIGNS[look.verdict], look.title, *values, *figures, look.verdict, style=_STYLES[look.verdict]
        )
    sides = f"{report.recent.name} ({report.recent.rows:,} rows) against {report.reference.name}"
    parts: list[RenderableType] = [Text(f"{sides} ({report.reference.rows:,})", style="dim"), table]
    parts += [Text(line) for look in report.having("drift") for line in _told(look)]
    parts += [Text(f"to do ({titles}): {advice}") for titles, advice in report.advice]
    parts += [Text(f"{look.title} not judged: {look.why}", style="dim") for look in report.having("not judged")]
    parts += [Text(note, style="dim") for note in (*report.notes, formatting.method_text(report))]
    return Group(*parts, Text(f"{report.sentence}."))


def _told(look: DriftTest) -> Iterator[str]:
    """Return the lines about the parts of a test that changed most."""
    shown = [part for part in look.parts if part.p_value is None or part.p_value <= _MAYBE][:_SHOWN]
    if shown:
        yield f"{look.title}:"
    for part in shown:
        reference, recent = formatting.part_texts(look, part)
        yield f"  {part.name}: {reference} \u2192 {recent}" + (f" ({part.note})" if part.note else "")


def html_drift(report: DriftReport) -> str:
    """Return the HTML page, which loads nothing from elsewhere."""
    return render(
        "plugins/monitoring/templates/drift.html",
        "Drift of use",
        report.model_dump_json(),
        report=report,
        words=formatting,
        chips=_CHIPS,
        chart=curves,
    )


def curves(look: DriftTest) -> str | None:
    """Return a chart of both distribution functions: the share of rows with at most a value."""
    if look.quantiles is None:
        return None
    before, now = look.quantiles
    low, high = min(before[0], now[0]), max(before[-1], now[-1])
    if not high > low:
        return None
    scale = 100 if look.unit == "ratio" else 1
    plot = Plot(SMALL, Scale(low * scale, high * scale, SMALL.left, SMALL.right), Scale(0, 1, SMALL.bottom, SMALL.top))
    plot.y_axis("share of rows with at most that much", lambda value: f"{value:.0%}")
    plot.x_axis("%" if look.unit == "ratio" else look.unit, lambda value: format_number(value))
    labels = []
    for css, name, values in (("baseline", "reference", before), ("final", "recent", now)):
        points = [(value * scale, index / (len(values) - 1)) for index, value in enumerate(values)]
        plot.add(with_tooltip(f"series {css}", name, plot.line(points, "curve")))
        labels.append((points[len(points) // 3 if css == "baseline" else 2 * len(points) // 3], name, f"label {css}"))
    plot.labels(labels)
    return plot.svg(f"{look.title}: distribution of the reference and of the recent rows")


_VERDICTS = {"worse": "bold red", "better": "green", "same": "", "can't tell": "yellow"}


def console_ab(report: AbReport) -> RenderableType:
    """Return a table with a line for each quantity, and the observation after which its verdict was known."""
    columns = [
        TableColumn("of B against A"),
        TableColumn("A", right=True),
        TableColumn("B", right=True),
        TableColumn("change", right=True),
    ]
    columns += [
        TableColumn("interval", right=True, rank=1),
        TableColumn("verdict"),
        TableColumn("told after", right=True, rank=2),
    ]
    table = ResponsiveTable("", columns, "hidden at this width; see --json")
    for quantity in report.judged:
        settled = (
            f"{quantity.told_after:,} of {quantity.looks:,}" if quantity.told_after else f"{quantity.looks:,} looks"
        )
        figures = formatting.change_text(quantity.change, quantity.unit), formatting.span_text(quantity)
        values = formatting.amount_text(quantity.a, quantity.unit), formatting.amount_text(quantity.b, quantity.unit)
        table.add(quantity.name, *values, *figures, quantity.verdict, settled, style=_VERDICTS[quantity.verdict])
    lines = [
        f"A: {report.a}",
        f"B: {report.b}",
        f"{report.requests:,} requests, {report.labeled:,} of them with a label",
    ]
    if report.agreement is not None:
        lines.append(f"both give the same answer to {report.agreement:.1%}")
    about = f"of equally good models a line is wrong in {report.level:.0%} of cases at most, however often one looks"
    return Group(
        *(Text(line, style="dim") for line in lines),
        table,
        *(Text(note, style="dim") for note in (*report.notes, about)),
        Text(f"{report.sentence}."),
    )
