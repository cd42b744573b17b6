"""Tables of reports and plans as HTML for notebooks."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from markupsafe import Markup
from rich.console import RenderableType

from compress.report.headline import verdict
from compress.report.rows import LIMIT_WORDS, approximate_mark, improvement_cell, limit_bound, limit_state
from compress.results.formatting import format_value
from compress.results.metrics import describe_metric, main_metrics
from compress.results.report import BASELINE, FINAL, Report
from compress.utils.terminal import Console

_WIDTH = 100
_HEADINGS = ("metric", "baseline", "final", "change", "verdict")


def report_table(report: Report) -> str:
    """Return a table for each target with the baseline, the final model, the change and the verdict on the limits."""
    parts = [Markup("<p><b>{}</b>: {}.</p>").format(report.recipe, verdict(report)[1])]
    for target in report.headed:
        parts.append(_table(f"on {target}", _rows(report, target)))
    parts += [Markup("<p>Target {} was skipped: {}</p>").format(skip.target, skip.reason) for skip in report.skipped]
    return "".join(parts)


def terminal_view(view: RenderableType) -> str:
    """Return tables for the terminal as preformatted HTML."""
    console = Console(record=True, width=_WIDTH, file=io.StringIO())
    console.print(view)
    return console.export_html(inline_styles=True, code_format='<pre style="line-height: 1.2">{code}</pre>')


def terminal_text(view: RenderableType) -> str:
    """Return tables for the terminal as plain text."""
    console = Console(width=_WIDTH, file=io.StringIO(), no_color=True)
    with console.capture() as capture:
        console.print(view)
    return capture.get().rstrip()


def _rows(report: Report, target: str) -> list[tuple[str, ...]]:
    """Return the cells of the metrics with a limit, and of the main metrics of the task."""
    units = report.metrics(target)
    limits = {limit.metric: limit for limit in report.limits if limit.target == target}
    metrics = {name: describe_metric(name, units[name]) for name in limits if name in units}
    metrics |= {metric.name: metric for metric in main_metrics(units)}
    rows: list[tuple[str, ...]] = []
    for name, metric in metrics.items():
        baseline, final = (report.find(model, name, target) for model in (BASELINE, FINAL))
        if final is not None:
            before = approximate_mark(report, baseline) + format_value(metric, baseline.value) if baseline else ""
            now = approximate_mark(report, final) + format_value(metric, final.value)
            state = f"{LIMIT_WORDS[limit_state(limits[name])]} ({limit_bound(limits[name])})" if name in limits else ""
            change = improvement_cell(report, FINAL, metric, target)
            rows.append((metric.title, before, now, change, state))
    return rows


def _table(caption: str, rows: Iterable[Sequence[str]]) -> Markup:
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(heading) for heading in _HEADINGS)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(Markup("").join(Markup("<td>{}</td>").format(cell) for cell in row))
        for row in rows
    )
    return Markup("<table><caption>{}</caption><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(
        caption, head, body
    )
