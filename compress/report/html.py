"""The report as one self-contained page: no request leaves it, and its policy forbids any."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from string import Template

from compress.metrics import main_metrics, other_metrics
from compress.report.continuations import continuations_html
from compress.report.headline import headlines, verdict
from compress.report.markup import escape, tag
from compress.report.rows import run_line, signs
from compress.report.schema import Report
from compress.report.sections import (
    bytes_section,
    charts_section,
    environment_section,
    latency_section,
    limits_section,
    measurements_section,
    notes_section,
    section,
    slices_section,
    stages_section,
)


def html_page(report: Report) -> str:
    """The whole page of a report."""
    title = f"{report.recipe} \u00b7 compress report"
    return whole_page(title, "\n".join(_body(report)), report.to_json())


def whole_page(title: str, body: str, json: str, more_style: str = "", more_script: str = "") -> str:
    """A page that asks for nothing: style and script within it are admitted by digest, all else is refused.

    ``body`` is markup, escaped already; ``title`` is text; ``json`` is kept in the page for whoever saves it.
    """
    style, script = _asset("page.css") + more_style, _asset("page.js") + more_script
    # Only a style or script with exactly these bytes is admitted, so nothing injected could run.
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("page.html")).substitute(
        policy=policy,
        title=escape(title),
        style=style,
        script=script,
        body=body,
        json=json.replace("<", "\\u003c"),
    )


def _asset(name: str) -> str:
    return (files("compress.report") / name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _body(report: Report) -> list[str]:
    parts = [_header(report)]
    several = len(report.targets) > 1
    for target in report.targets:
        parts += [tag("h2", "", escape(f"On {target}"))] if several else []
        parts += [_tiles(report, target)]
    parts += [notes_section(report), limits_section(report)]
    for target in report.targets:
        place = f" on {target}" if several else ""
        units = report.metrics(target)
        parts += [
            charts_section(report, target, place),
            slices_section(report, target, place),
            section(f"What they write{place}", continuations_html(report, target)),
            latency_section(report, target, place),
            measurements_section(report, target, f"Every model{place}", main_metrics(units)),
            measurements_section(report, target, f"Further measurements{place}", other_metrics(units)),
        ]
    return [
        part for part in [*parts, bytes_section(report), stages_section(report), environment_section(report)] if part
    ]


def _header(report: Report) -> str:
    status, sentence = verdict(report)
    lead = tag("p", "lead", escape(report.description)) if report.description else ""
    facts = [run_line(report), f"measured on {', '.join(report.ran_on)}" if report.ran_on else ""]
    quiet = tag("p", "quiet", escape(", ".join(filter(None, facts))))
    words = tag("div", "", tag("p", "eyebrow", "compress report"), tag("h1", "", escape(report.recipe)), lead, quiet)
    return tag("header", "head", words, tag("span", f"chip big {status}", escape(sentence)))


def _tiles(report: Report, target: str) -> str:
    marks = {"passed": "\u2713 ", "missed": "\u2717 ", "unknown": "? ", "none": ""}
    tiles = []
    for headline in headlines(report, target):
        limit = signs(headline.limit)
        chip = tag("span", f"chip {headline.status}", escape(marks[headline.status] + limit)) if limit else ""
        tiles.append(
            tag(
                "div",
                "card tile",
                tag("span", "name", escape(headline.label)),
                tag("span", "figure", escape(headline.figure)),
                tag("span", "detail", escape(headline.detail)),
                chip,
            )
        )
    return tag("div", "tiles", *tiles) if tiles else ""
