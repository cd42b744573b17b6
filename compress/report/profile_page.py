"""A profile as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import PurePath

from compress.bench.profile import Profile, Row
from compress.metrics import format_bytes
from compress.report.html import whole_page
from compress.report.markup import element, escape, tag
from compress.report.profile_words import (
    binds_text,
    call_text,
    count_text,
    giga_text,
    interval_text,
    limit_facts,
    method_notes,
    rate_text,
    share_text,
    time_text,
    verdict_text,
    working_set_text,
)
from compress.report.roofline_chart import roofline_chart
from compress.report.rows import environment_rows
from compress.report.sections import cell, meter, panel, row_head, section, table

_STYLE = """
.chart .int8 .mark { fill: var(--final); fill-opacity: 0.72; }
.chart .fp32 .mark { fill: var(--baseline); fill-opacity: 0.72; }
.chart .whole .mark { fill: var(--ink); }
.chart .roof { stroke-width: 1.75; stroke: var(--faint); }
.chart .roof.int8 { stroke: var(--final); } .chart .roof.fp32 { stroke: var(--baseline); }
.chart .roof.working { stroke: var(--ink); } .chart .roof.memory { stroke-dasharray: 5 4; }
.chart text.roof-name { stroke: var(--card); stroke-width: 3px; paint-order: stroke; fill: var(--soft); }
.chart text.roof-name.int8 { fill: var(--final); } .chart text.roof-name.fp32 { fill: var(--baseline); }
.roofline .chart { max-width: 860px; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin: 0 5px 0 12px; }
.key.int8 { background: var(--final); } .key.fp32 { background: var(--baseline); }
.key.whole { background: var(--ink); border-radius: 1px; transform: rotate(45deg); width: 8px; height: 8px; }
.roofline .quiet { margin-top: 8px; }
.limits dt { flex: 1; } .limits dd { white-space: nowrap; }
.chip.compute { background: var(--good-soft); color: var(--good); }
.chip.memory { background: var(--final-soft); color: var(--final); }
.chip.overhead { background: var(--baseline-soft); color: var(--baseline); }
"""


def profile_page(profile: Profile) -> str:
    """The whole page. Every text of the profile is escaped."""
    name = artifact_name(profile)
    body = [
        _header(profile, name),
        _tiles(profile),
        _notes(profile),
        _roofline(profile),
        _limits(profile),
        section("By operator type", _table("Operator", profile.by_operator())),
        section("By layer", _table("Layer", profile.by_layer())),
        _nodes(profile),
        _environment(profile),
    ]
    content = json.dumps(profile.to_json())
    return whole_page(f"{name} \u00b7 compress profile", "\n".join(filter(None, body)), content, _STYLE)


def artifact_name(profile: Profile) -> str:
    """`quickstart/2026-11-25T15-03-48` for the model folder of a run, else the last part of the path."""
    parts = [part for part in PurePath(profile.artifact).parts if part != "/"]
    return "/".join(parts[-3:-1]) if len(parts) > 2 and parts[-1] == "model" else (parts or ["artifact"])[-1]


def _header(profile: Profile, name: str) -> str:
    facts = f"{profile.target}, {profile.threads} threads, {call_text(profile)}"
    processor = profile.environment.get("processor")
    quiet = tag("p", "quiet", escape(f"{facts}, {processor}" if processor else facts))
    lead = tag("p", "lead", escape(verdict_text(profile)))
    words = tag("div", "", tag("p", "eyebrow", "compress profile"), tag("h1", "", escape(name)), lead, quiet)
    return tag("header", "head", words, _chip(profile.whole, "chip big"))


def _chip(row: Row, css_class: str = "chip") -> str:
    bound = binds_text(row)
    words = f"{bound} binds" if "big" in css_class and row.binds else bound
    return tag("span", f"{css_class} {row.binds or 'none'}", escape(words[:1].upper() + words[1:]))


def _tiles(profile: Profile) -> str:
    whole = profile.whole
    figures = [
        ("Of this machine's limit", share_text(whole.share_of_roof),
         f"it could need {time_text(whole.limit_ms)} at best"),
        ("A call takes", time_text(whole.time_ms), f"95% interval {interval_text(profile)}"),
        ("Arithmetic, GOP/s", giga_text(whole.operations_per_s),
         f"{count_text(whole.operations)} operations, {_int8_share(whole)} on 8-bit integers"),
        ("Bytes moved", format_bytes(whole.moved_bytes),
         f"{format_bytes(whole.weight_bytes)} of weights, {rate_text(whole.bytes_per_s, 'B')}"),
    ]  # fmt: skip
    tiles = [
        tag(
            "div",
            "card tile",
            tag("span", "name", escape(name)),
            tag("span", "figure", escape(figure)),
            tag("span", "detail", escape(detail)),
        )
        for name, figure, detail in figures
    ]
    return tag("div", "tiles", *tiles)


def _int8_share(row: Row) -> str:
    return f"{row.int8_operations / row.operations:.0%}" if row.operations else "none"


def _notes(profile: Profile) -> str:
    return tag("ul", "card notes", *(tag("li", "", escape(note)) for note in method_notes(profile)))


def _roofline(profile: Profile) -> str:
    drawing = roofline_chart(profile)
    caption = (
        "Each dot is an operator, its area the time it takes; one on its roof could not be faster here. "
        "Operators that only move bytes are in the tables below."
    )
    keys = "".join(
        tag("span", f"key {css_class}") + escape(name)
        for css_class, name in (("int8", "8-bit products"), ("fp32", "float"), ("whole", "the whole model"))
    )
    drawn = panel("Operators under the roof of this machine", caption, drawing)
    return section("How close to the limit", tag("div", "roofline", drawn, tag("p", "quiet", keys)) if drawn else "")


def _limits(profile: Profile) -> str:
    facts = [
        tag("div", "", tag("dt", "", escape(name)), tag("dd", "", escape(value)))
        for name, value in limit_facts(profile.limits)
    ]
    words = tag("p", "quiet", escape(working_set_text(profile.limits)))
    return section(
        "Limits of this machine, measured in the same minutes", tag("dl", "card facts limits", *facts), words
    )


def _table(head: str, rows: Sequence[Row]) -> str:
    heads = (head, "Nodes", "Time", "Share of the time", "Of the limit", "GOP/s", "GB/s", "Binds")
    longest = max((row.time_ms for row in rows), default=0.0) or 1.0
    together = sum(row.time_ms for row in rows) or 1.0
    lines = [
        tag(
            "tr",
            "",
            row_head(row.name),
            cell(str(row.nodes), row.nodes),
            cell(escape(time_text(row.time_ms)), row.time_ms),
            cell(
                f"{row.time_ms / together:.1%}" + meter(row.time_ms / longest, "", f"{row.time_ms / together:.1%}"),
                row.time_ms,
                "bar left",
            ),
            *_reached(row),
        )
        for row in rows
    ]
    return table(heads, lines, "sortable", left=(3,))


def _reached(row: Row) -> list[str]:
    """Share of the limit, both rates, and which side binds."""
    if not row.counted:
        return [cell("\u2013", ""), cell("\u2013", ""), cell("\u2013", ""), cell(_chip(row), binds_text(row))]
    rates = (row.operations_per_s, row.bytes_per_s)
    return [
        cell(escape(share_text(row.share_of_roof)), row.share_of_roof),
        *(cell(escape(giga_text(rate)), rate) for rate in rates),
        cell(_chip(row), binds_text(row)),
    ]


def _nodes(profile: Profile) -> str:
    heads = ("Node", "Operator", "Layer", "Time", "Operations", "Bytes", "Of the limit", "GOP/s", "GB/s", "Binds")
    lines = [
        tag("tr", "", row_head(row.name), cell(escape(row.operators[0]), css_class="left"),
            cell(escape(row.layer or ""), css_class="left"), cell(escape(time_text(row.time_ms)), row.time_ms),
            cell(escape(count_text(row.operations)), row.operations),
            cell(escape(format_bytes(row.moved_bytes)), row.moved_bytes), *_reached(row))
        for row in profile.rows
    ]  # fmt: skip
    summary = tag("summary", "", escape(f"All {len(lines)} operators, in the order of the graph"))
    return section("Every operator", tag("details", "card", summary, table(heads, lines, "sortable", left=(1, 2))))


def _environment(profile: Profile) -> str:
    facts = [
        element("div", {}, tag("dt", "", escape(name)), tag("dd", "", escape(value)))
        for name, value in environment_rows(profile.environment)
    ]
    return section("Environment", tag("dl", "card facts", *facts)) if facts else ""
