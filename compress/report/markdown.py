"""The report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from compress.metrics import Metric, format_measurement, improvement, main_metrics, other_metrics
from compress.report.continuations import alike, written
from compress.report.headline import headlines, verdict
from compress.report.rows import (
    environment_rows,
    format_cell,
    limit_bound,
    limit_found,
    limit_state,
    run_line,
    signs,
    stage_cells,
    stage_remarks,
    stage_tables,
    words_of,
)
from compress.report.schema import BASELINE, Report
from compress.report.slices import slice_cells, slice_figures

_SPECIAL = re.compile(r"([\\`*\[\]|]|^[>#+-])")


def markdown_report(report: Report) -> str:
    """Verdict, headline figures, every measured model, limits, stages, environment and skipped targets."""
    return "\n".join(_lines(report)).rstrip() + "\n"


def escape_markdown(value: str) -> str:
    """``value`` as plain words: no HTML, no emphasis, no table border, one line."""
    flat = " ".join(value.split())
    return _SPECIAL.sub(r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;"))


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """A table of plain texts; columns other than ``left`` are set flush right."""
    rule = ["---" if place in left else "---:" for place in range(len(heads))]
    written = [[escape_markdown(cell) for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in [[escape_markdown(head) for head in heads], rule, *written]]


def _lines(report: Report) -> Iterator[str]:
    yield f"# {escape_markdown(report.recipe)}"
    for words in (report.description, run_line(report)):
        yield from ("", escape_markdown(words)) if words else ()
    yield from ("", f"**{escape_markdown(verdict(report)[1])}.**")
    for target in report.targets:
        yield from _target(report, target)
    yield from _limits(report)
    yield from _stages(report)
    yield from _listed("Notes", report.notes)
    yield from _listed("Skipped targets", [f"{skip.target}: {skip.reason}" for skip in report.skipped])
    yield from _environment(report)


def _target(report: Report, target: str) -> Iterator[str]:
    yield ""
    for headline in headlines(report, target):
        label, figure, detail = map(escape_markdown, (headline.label, headline.figure, headline.detail))
        limit = f", limit {escape_markdown(signs(headline.limit))} {headline.status}" if headline.limit else ""
        yield f"- {label}: **{figure}**{f' ({detail})' if detail else ''}{limit}"
    units = report.metrics(target)
    yield from _measured(report, target, f"Measured on {target}", main_metrics(units))
    yield from _against(report, target, main_metrics(units))
    yield from _slices(report, target)
    yield from _continuations(report, target)
    yield from _measured(report, target, f"Further measurements on {target}", other_metrics(units))


def _models(report: Report, target: str, metrics: Sequence[Metric]) -> list[str]:
    return [model for model in report.models if any(report.find(model, metric.name, target) for metric in metrics)]


def _measured(report: Report, target: str, heading: str, metrics: Sequence[Metric]) -> Iterator[str]:
    models = _models(report, target, metrics)
    if models:
        rows = [[model, *(_written(report, model, metric, target) for metric in metrics)] for model in models]
        yield from ("", f"## {escape_markdown(heading)}", "", "Intervals are 95%.", "")
        yield from markdown_table(["Model", *(metric.title for metric in metrics)], rows)


def _written(report: Report, model: str, metric: Metric, target: str) -> str:
    row = report.find(model, metric.name, target)
    return format_measurement(row) if row else ""


def _against(report: Report, target: str, metrics: Sequence[Metric]) -> Iterator[str]:
    """The same table as ratios to the baseline."""
    base = {metric.name: report.find(BASELINE, metric.name, target) for metric in metrics}
    compared = [metric for metric in metrics if base[metric.name]]
    models = [model for model in _models(report, target, compared) if model != BASELINE]
    if not models:
        return
    rows = []
    for model in models:
        cells = [model]
        for metric in compared:
            row, before = report.find(model, metric.name, target), base[metric.name]
            cells.append(improvement(metric, row.value, before.value) if row and before else "")
        rows.append(cells)
    yield from ("", f"## Against the baseline on {escape_markdown(target)}", "")
    yield from markdown_table(["Model", *(metric.title for metric in compared)], rows)


def _slices(report: Report, target: str) -> Iterator[str]:
    found = slice_figures(report, target)
    if found is None:
        return
    yield from ("", f"## {escape_markdown(found[0].title)} by slice on {escape_markdown(target)}", "")
    yield from ("Changes are paired row by row. Intervals are 95% each: of many slices one looks bad by chance.", "")
    heads = ("Slice", "Holds", "Rows", "Baseline", "Final", "Change")
    yield from markdown_table(heads, slice_cells(found[1]), left=(0, 1))


def _continuations(report: Report, target: str) -> Iterator[str]:
    pairs = written(report, target)
    if pairs:
        yield from ("", f"## What they write on {escape_markdown(target)}", "", f"{alike(pairs)}.", "")
        rows = [(pair.prompt, pair.baseline.text, pair.final.text) for pair in pairs]
        yield from markdown_table(("Prompt", "Baseline", "Final"), rows, left=(0, 1, 2))


def _limits(report: Report) -> Iterator[str]:
    if report.limits:
        rows = [
            (limit.metric, limit.target, limit_bound(limit), limit_found(report, limit), limit_state(limit))
            for limit in report.limits
        ]
        yield from ("", "## Limits", "")
        yield from markdown_table(("Metric", "Target", "Limit", "Found", "Verdict"), rows, left=range(5))


def _stages(report: Report) -> Iterator[str]:
    if report.stages:
        rows = [(stage.name, *stage_cells(stage), stage.key[:12]) for stage in report.stages]
        yield from ("", "## Stages", "")
        yield from markdown_table(("Stage", "Time", "Checks", "Cache", "Peak memory", "Key"), rows, left=(0, 3, 5))
    if said := stage_remarks(report):
        yield ""
        yield from (f"- {escape_markdown(line)}" for line in said)
    for heading, table in stage_tables(report):
        yield from ("", f"### {escape_markdown(heading)}", "")
        texts = [[format_cell(value) for value in row] for row in table.rows]
        yield from markdown_table(table.columns, texts, left=words_of(table))


def _listed(heading: str, lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield from ("", f"## {heading}", "")
        yield from (f"- {escape_markdown(line)}" for line in lines)


def _environment(report: Report) -> Iterator[str]:
    rows = list(environment_rows(report.environment))
    if rows:
        yield from ("", "## Environment", "")
        yield from markdown_table(("What", "Value"), rows, left=(0, 1))
