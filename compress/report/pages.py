"""Pages and Markdown by jinja2. Pages are self-contained: no request leaves them, and their policy forbids any."""

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

from compress.report import charts, continuations, generated_images, headline, layers, rows, slices
from compress.report.run_folder import REPORT, write_whole
from compress.results import formatting, metrics
from compress.results.formatting import format_measurement, improvement
from compress.results.metrics import Metric
from compress.results.report import BASELINE, Report

_PARTS = PurePosixPath("report/templates/page.html")
_STRICT: dict[str, Any] = {
    "loader": PackageLoader("compress", ""), "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True
}  # fmt: skip
_SPECIAL = re.compile(r"([\\`*\[\]|]|^[>#+-])")
_BLANK = re.compile(r"\n{3,}")
Cells = list[list[str]]


def render(template: str, title: str, json: str, *, styled: str = "", **values: Any) -> str:
    """The page of a template of this package, with ``json`` kept in it for whoever saves it.

    Every value but markup is escaped. Files of style and script that lie beside the template under its name, and beside
    ``styled``, another that it takes parts of, are added to those of all pages, and admitted by digest, so that nothing
    injected could run.
    """
    templates = [PurePosixPath(one) for one in (styled, template) if one]
    style, script = (_assets(templates, suffix) for suffix in (".css", ".js"))
    page = _templates().get_template(template)
    return page.render(title=title, style=style, script=script, json=Markup(json.replace("<", "\\u003c")), **values)


def render_text(template: str, **values: Any) -> str:
    """A template of this package as it stands, every value escaped."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    found = Environment(autoescape=True, **_STRICT)
    described = metrics.describe_metric
    found.filters |= {
        "as_class": lambda name: Markup(f' class="{escape(name)}"') if name else "",
        "bytes": formatting.format_bytes,
        "digest": lambda text: f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}",
        "interval": lambda row: formatting.format_interval(described(row.metric, row.unit), row.low, row.high),
        "seconds": formatting.format_seconds,
        "signs": rows.signs,
        "value": lambda row: formatting.format_value(described(row.metric, row.unit), row.value),
    }
    return found


def _assets(templates: Iterable[PurePosixPath], suffix: str) -> Markup:
    """The style or script of all pages, and that of these."""
    found = [files("compress") / str(page.with_suffix(suffix)) for page in (_PARTS, *templates)]
    return Markup("".join(file.read_text(encoding="utf-8") for file in found if file.is_file()))


def html_page(report: Report) -> str:
    """The whole page of a report."""
    return render(
        "report/templates/report.html",
        f"{report.recipe} \u00b7 compress report",
        report.to_json(),
        report=report,
        stored=layers.stored_bytes(report),
        charts=charts,
        continuations=continuations,
        headline=headline,
        layers=layers,
        metrics=metrics,
        pictures=generated_images,
        rows=rows,
        slices=slices,
    )


def render_markdown(template: str, **values: Any) -> str:
    """A template of this package. Every value is escaped; blank lines in a row count as one, so templates have air."""
    return _BLANK.sub("\n\n", _markdown_templates().get_template(template).render(**values)).strip() + "\n"


def escape_markdown(value: str) -> str:
    """``value`` as plain words: no HTML, no emphasis, no table border, one line."""
    flat = " ".join(value.split())
    return _SPECIAL.sub(r"\\\1", flat.replace("&", "&amp;").replace("<", "&lt;"))


@cache
def _markdown_templates() -> Environment:
    found = Environment(
        finalize=lambda value: value if isinstance(value, Markup) else escape_markdown(str(value)), **_STRICT
    )
    found.filters["cell"] = rows.format_cell
    found.globals |= {"table": _table, "section": _section, "listed": _listed, "folded": _folded}
    return found


def _table(heads: Sequence[str], cells: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> Markup:
    """A table of plain texts; columns other than ``left`` are set flush right."""
    rule = ["---" if place in left else "---:" for place in range(len(heads))]
    written = [[escape_markdown(cell) for cell in row] for row in [heads, *cells]]
    return Markup("\n".join(f"| {' | '.join(row)} |" for row in [written[0], rule, *written[1:]]))


def _section(
    heading: str, about: str, heads: Sequence[str], cells: Iterable[Sequence[str]], left: Sequence[int] = (0,)
) -> Markup:
    """A table below its heading; nothing without a row."""
    known = list(cells)
    above = f"## {escape_markdown(heading)}\n\n{escape_markdown(about)}\n\n"
    return Markup(above) + _table(heads, known, left) if known else Markup()


def _listed(heading: str, lines: Iterable[str]) -> Markup:
    items = "\n".join(f"- {escape_markdown(line)}" for line in lines)
    return Markup(f"## {escape_markdown(heading)}\n\n{items}" if items else "")


def _folded(summary: str, content: Markup | Iterable[str]) -> Markup:
    """Markdown, or lines as a list, behind a summary; nothing where there are none."""
    if not isinstance(content, Markup):
        content = Markup("\n".join(f"- {escape_markdown(line)}" for line in content))
    above = f"<details><summary>{escape_markdown(summary)}</summary>"
    return Markup(f"{above}\n\n{content}\n\n</details>" if content else "")


def markdown_report(report: Report) -> str:
    """Verdict, headline figures, every measured model, limits, stages, environment and skipped targets."""
    return render_markdown(
        "report/templates/report.md",
        report=report,
        against=_against,
        continuations=continuations,
        headline=headline,
        measured=_measured,
        metrics=metrics,
        pictures=generated_images,
        rows=rows,
        slices=slices,
    )


def _measured(report: Report, target: str, wanted: Sequence[Metric]) -> tuple[list[str], Cells]:
    """Every model with its values and their intervals."""
    cells = []
    for model in rows.models_of(report, target, wanted):
        found = [report.find(model, metric.name, target) for metric in wanted]
        cells.append([model, *(format_measurement(row) if row else "" for row in found)])
    return ["Model", *(metric.title for metric in wanted)], cells


def _against(report: Report, target: str, wanted: Sequence[Metric]) -> tuple[list[str], Cells]:
    """The same table as ratios to the baseline."""
    base = {metric.name: report.find(BASELINE, metric.name, target) for metric in wanted}
    compared = [metric for metric in wanted if base[metric.name]]
    cells = []
    for model in rows.models_of(report, target, compared):
        if model == BASELINE:
            continue
        cells.append([model])
        for metric in compared:
            row, before = report.find(model, metric.name, target), base[metric.name]
            cells[-1].append(improvement(metric, row.value, before.value) if row and before else "")
    return ["Model", *(metric.title for metric in compared)], cells


def write_report(report: Report, folder: Path) -> None:
    """Write report.json, report.md and report.html, each whole or not at all. Raises `StorageError`."""
    contents = {
        REPORT: report.to_json(),
        "report.md": markdown_report(report),
        "report.html": html_page(report),
    }
    for name, content in contents.items():
        write_whole(folder / name, content)
