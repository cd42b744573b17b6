"""HTML pages and Markdown from jinja2 templates. Pages are self-contained: their policy forbids any request."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path, PurePosixPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from compress.report import charts, generated_outputs, headline, rows, slices
from compress.report.run_folder import REPORT, write_atomically
from compress.results import formatting, metrics
from compress.results.formatting import format_measurement
from compress.results.metrics import Metric
from compress.results.report import BASELINE, Report

_PARTS = PurePosixPath("report/templates/page.html")
_STRICT: dict[str, Any] = {
    "loader": PackageLoader("compress", ""), "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True
}  # fmt: skip
_SPECIAL = re.compile(r"([\\`*\[\]|]|^[>#+-])")
_BLANK = re.compile(r"\n{3,}")
Cells = list[list[str]]


def render(template: str, title: str, json: str, *, styled: str = "", **values: object) -> str:
    """Return the page of a template, with the JSON that its button saves.

    Every value that is not markup is escaped. Style and script files beside the template, with the same name, are
    included and allowed by their digest, so that injected code cannot run.

    Args:
        template: Path of the template in this package.
        title: Title of the page.
        json: JSON that the page contains.
        styled: Another template whose style and script the page needs too.
        **values: Values of the template.
    """
    # The style and script that all pages share come before those of the templates.
    templates = [_PARTS, *(PurePosixPath(path) for path in (styled, template) if path)]
    assets = []
    for suffix in (".css", ".js"):
        files_of_templates = [files("compress") / str(path.with_suffix(suffix)) for path in templates]
        texts = [file.read_text(encoding="utf-8") for file in files_of_templates if file.is_file()]
        assets.append(Markup("".join(texts)))
    style, script = assets
    page = _templates().get_template(template)
    return page.render(title=title, style=style, script=script, json=Markup(json.replace("<", "\\u003c")), **values)


def render_text(template: str, **values: object) -> str:
    """Return a template of this package with every value escaped."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    environment = Environment(autoescape=True, **_STRICT)
    describe = metrics.describe_metric
    environment.filters |= {
        "as_class": lambda name: Markup(f' class="{escape(name)}"') if name else "",
        "bytes": formatting.format_bytes,
        "digest": lambda text: f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}",
        "interval": lambda row: formatting.format_interval(describe(row.metric, row.unit), row.low, row.high),
        "seconds": formatting.format_seconds,
        "signs": rows.comparison_signs,
        "value": lambda row: formatting.format_value(describe(row.metric, row.unit), row.value),
    }
    return environment


def html_page(report: Report) -> str:
    """Return the HTML page of a report."""
    return render(
        "report/templates/report.html",
        f"{report.recipe} \u00b7 compress report",
        report.to_json(),
        report=report,
        stored=rows.module_bytes(report),
        charts=charts,
        continuations=generated_outputs,
        headline=headline,
        layers=rows,
        metrics=metrics,
        pictures=generated_outputs,
        rows=rows,
        slices=slices,
    )


def render_markdown(template: str, **values: object) -> str:
    """Return a Markdown template with every value escaped. Successive blank lines count as one."""
    return _BLANK.sub("\n\n", _markdown_templates().get_template(template).render(**values)).strip() + "\n"


def escape_markdown(value: str) -> str:
    """Return ``value`` as one line of plain text: no HTML, no emphasis, no table border."""
    flat = " ".join(value.split())
    return _SPECIAL.sub(r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;"))


@cache
def _markdown_templates() -> Environment:
    environment = Environment(
        finalize=lambda value: value if isinstance(value, Markup) else escape_markdown(str(value)), **_STRICT
    )
    environment.filters["cell"] = rows.format_cell
    environment.globals |= {"table": _table, "section": _section, "listed": _listed, "folded": _folded}
    return environment


def _table(heads: Sequence[str], cells: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> Markup:
    """Return a table of plain texts. Columns other than ``left`` are aligned right."""
    rule = ["---" if index in left else "---:" for index in range(len(heads))]
    written = [[escape_markdown(cell) for cell in row] for row in [heads, *cells]]
    return Markup("\n".join(f"| {' | '.join(row)} |" for row in [written[0], rule, *written[1:]]))


def _section(
    heading: str, about: str, heads: Sequence[str], cells: Iterable[Sequence[str]], left: Sequence[int] = (0,)
) -> Markup:
    """Return a table below its heading, or nothing without rows.

    Args:
        heading: Heading.
        about: Text between heading and table.
        heads: Names of the columns.
        cells: Rows.
        left: Columns that are aligned left.
    """
    rows = list(cells)
    introduction = f"## {escape_markdown(heading)}\n\n{escape_markdown(about)}\n\n"
    return Markup(introduction) + _table(heads, rows, left) if rows else Markup()


def _listed(heading: str, lines: Iterable[str]) -> Markup:
    items = "\n".join(f"- {escape_markdown(line)}" for line in lines)
    return Markup(f"## {escape_markdown(heading)}\n\n{items}" if items else "")


def _folded(summary: str, content: Markup | Iterable[str]) -> Markup:
    """Return Markdown, or lines as a list, behind a summary, or nothing if there are none."""
    if not isinstance(content, Markup):
        content = Markup("\n".join(f"- {escape_markdown(line)}" for line in content))
    opening_tag = f"<details><summary>{escape_markdown(summary)}</summary>"
    return Markup(f"{opening_tag}\n\n{content}\n\n</details>" if content else "")


def markdown_report(report: Report) -> str:
    """Return verdict, headlines, every measured model, limits, stages, environment and skipped targets as Markdown."""
    return render_markdown(
        "report/templates/report.md",
        report=report,
        against=_against,
        continuations=generated_outputs,
        headline=headline,
        measured=_measured,
        metrics=metrics,
        pictures=generated_outputs,
        rows=rows,
        slices=slices,
    )


def _measured(report: Report, target: str, columns: Sequence[Metric]) -> tuple[list[str], Cells]:
    """Return a table of every model with its values and their intervals."""
    cells = []
    for model, name in rows.models_of(report, target, columns).items():
        measurements = [report.find(model, metric.name, target) for metric in columns]
        cells.append(
            [
                name,
                *(rows.approximate_mark(report, row) + format_measurement(row) if row else "" for row in measurements),
            ]
        )
    return ["Model", *(metric.title for metric in columns)], cells


def _against(report: Report, target: str, columns: Sequence[Metric]) -> tuple[list[str], Cells]:
    """Return a table of every model with the ratios of its values to the baseline's."""
    compared = [metric for metric in columns if report.find(BASELINE, metric.name, target)]
    cells = [
        [name, *(rows.improvement_text(report, model, metric, target) for metric in compared)]
        for model, name in rows.models_of(report, target, compared).items()
        if model != BASELINE
    ]
    return ["Model", *(metric.title for metric in compared)], cells


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html, each atomically. Raises `StorageError`."""
    contents = {
        REPORT: report.to_json(),
        "report.md": markdown_report(report),
        "report.html": html_page(report),
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
