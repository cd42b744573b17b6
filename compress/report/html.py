"""Pages by jinja2, self-contained: no request leaves them, and their policy forbids any."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from compress import metrics
from compress.report import charts, continuations, headline, layers, rows, slices
from compress.report.schema import Report

_PARTS = PurePosixPath("report/templates/page.html")


def render(template: str, title: str, json: str, **values: Any) -> str:
    """The page of a template of this package, with ``json`` kept in it for whoever saves it.

    Every value but markup is escaped. Files of style and script that lie beside the template under its name are added
    to those of all pages, and admitted by digest, so that nothing injected could run.
    """
    style, script = (_assets(PurePosixPath(template), suffix) for suffix in (".css", ".js"))
    page = _templates().get_template(template)
    return page.render(title=title, style=style, script=script, json=Markup(json.replace("<", "\\u003c")), **values)


def render_text(template: str, **values: Any) -> str:
    """A template of this package as it stands, every value escaped."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Environment:
    found = Environment(
        loader=PackageLoader("compress", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    described = metrics.describe_metric
    found.filters |= {
        "as_class": lambda name: Markup(f' class="{escape(name)}"') if name else "",
        "bytes": metrics.format_bytes,
        "digest": lambda text: f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}",
        "interval": lambda row: metrics.format_interval(described(row.metric, row.unit), row.low, row.high),
        "seconds": metrics.format_seconds,
        "signs": rows.signs,
        "value": lambda row: metrics.format_value(described(row.metric, row.unit), row.value),
    }
    return found


def _assets(template: PurePosixPath, suffix: str) -> Markup:
    """The style or script of all pages, and that of this one."""
    found = [files("compress") / str(page.with_suffix(suffix)) for page in (_PARTS, template)]
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
        rows=rows,
        slices=slices,
    )
