"""The trend page: what is wrong tonight, what became of each entry, and every measured line over the nights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise

from compress.metrics import format_seconds, format_value, main_metrics
from compress.nightly.chart import change_state, change_words, trend_chart
from compress.nightly.drift import MACHINE, REFERENCE, suspects
from compress.nightly.record import Night, first_line
from compress.nightly.trend import Series
from compress.report.html import whole_page
from compress.report.markup import Attribute, element, escape, tag
from compress.report.schema import FINAL
from compress.report.sections import cell, row_head, section, table

MOST_NIGHTS = 180
"""Older nights stay in the history; a page with all of them would be too large to open."""
_CALENDAR_NIGHTS = 60
_STATES = {"passed": "passed", "missed": "missed", "failed": "failed", "not run": "idle"}
_SIGNS = {"passed": "\u2713 passed", "missed": "\u2717 missed", "failed": "\u2717 failed", "not run": "not run"}


def night_page(night: Night, nights: Sequence[Night], series: Sequence[Series], description: str = "") -> str:
    """The whole page. ``nights`` are all of the suite in their order; ``series`` all of its lines."""
    recent = {one.number for one in nights[-MOST_NIGHTS:]}
    lines = [short for one in series if (short := _recent(one, recent)) is not None]
    by_number = {one.number: one for one in nights}
    body = [
        _header(night, nights, description),
        _findings(night),
        _notes(night),
        section("Entries", _entries(night, nights)),
        section("Over the nights", _filters(lines), _trends(lines, by_number)),
        section("Changes of level", _changes(lines, by_number)),
    ]
    style, script = ((files("compress.nightly") / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    kept = json.dumps(night.model_dump(mode="json"), ensure_ascii=False)
    title = f"{night.suite}, {night.label} \u00b7 compress nightly"
    return whole_page(title, "\n".join(part for part in body if part), kept, style, script)


def verdict(night: Night) -> tuple[str, str]:
    """Its state and a sentence: (`missed`, `1 of 3 entries missed`)."""
    counts = {state: sum(outcome.status == state for outcome in night.outcomes) for state in _STATES}
    told = [f"{counts[state]} {state}" for state in ("failed", "missed", "not run") if counts[state]]
    whole = len(night.outcomes)
    if not told:
        return "passed", f"all {whole} entries passed" if whole > 1 else "the entry passed"
    return "missed", f"{', '.join(told)} of {whole} {'entries' if whole > 1 else 'entry'}"


def is_main(series: Series) -> bool:
    """Whether a line is of what a report puts first, or a reference kernel."""
    if series.model == MACHINE:
        return series.metric.startswith(REFERENCE)
    return series.metric in {metric.name for metric in main_metrics({series.metric: series.unit})}


def _recent(series: Series, recent: set[int]) -> Series | None:
    points = tuple(point for point in series.points if point.night in recent)
    if not points:
        return None
    return series if len(points) == len(series.points) else replace(series, points=points)


def _header(night: Night, nights: Sequence[Night], description: str) -> str:
    state, sentence = verdict(night)
    moment = f"{night.started[:16].replace('T', ' ')} {night.started[19:]}".strip()
    commit = f", commit {night.short_commit}" if night.commit else ""
    facts = f"night {night.number} of {len(nights)}, {moment}{commit}, took {format_seconds(night.seconds)}"
    words = tag(
        "div",
        "",
        tag("p", "eyebrow", "compress nightly"),
        tag("h1", "", escape(night.suite)),
        tag("p", "lead", escape(description)) if description else "",
        tag("p", "quiet", escape(facts)),
        tag("p", "quiet", escape(night.host.words)),
    )
    return tag("header", "head", words, tag("span", f"chip big {state}", escape(sentence)))


def _findings(night: Night) -> str:
    items = []
    for found in night.findings:
        since = f", since {found.since}" if found.since else ""
        items.append(tag("li", "", tag("strong", "", escape(found.culprit)), escape(f": {found.what}{since}")))
    return tag("ul", "card findings", *items) if items else ""


def _notes(night: Night) -> str:
    items = [tag("li", "", escape(line)) for line in night.all_notes]
    if len(items) <= 3:
        return tag("ul", "card notes", *items) if items else ""
    heading = tag("summary", "", escape(f"{len(items)} notes"))
    return tag("details", "card notes", heading, tag("ul", "", *items))


def _entries(night: Night, nights: Sequence[Night]) -> str:
    rows = []
    for outcome in night.outcomes:
        chip = tag("span", f"chip {_STATES[outcome.status]}", escape(_SIGNS[outcome.status]))
        took = format_seconds(outcome.seconds) if outcome.seconds else ""
        cells = [
            element("td", {"class": "left wrap", "data-head": ""}, escape(first_line(outcome.reason))),
            element("td", {"data-head": "took"}, escape(took)),
            element("td", {"class": "left", "data-head": ""}, _calendar(outcome.entry, nights)),
            cell(chip),
        ]
        rows.append(tag("tr", "", row_head(outcome.entry), *cells))
    heads = ("Entry", "Outcome", "Time", f"Last {min(len(nights), _CALENDAR_NIGHTS)} nights", "Verdict")
    return table(heads, rows, "stack", left=(1, 3))


def _calendar(entry: str, nights: Sequence[Night]) -> str:
    """A square a night: kept, missed, failed (crossed), not run."""
    parts, told = [], {"passed": 0, "missed": 0, "failed": 0, "not run": 0}
    shown = nights[-_CALENDAR_NIGHTS:]
    for place, night in enumerate(shown):
        outcome = next((one for one in night.outcomes if one.entry == entry), None)
        status = outcome.status if outcome else "not run"
        told[status] += 1
        x = place * 6.0
        box: dict[str, Attribute] = {"x": x, "y": 2, "width": 5, "height": 16, "rx": 1.5, "class": _STATES[status]}
        words = element("title", None, escape(f"{night.label}: {status}"))
        cross = element("path", {"d": f"M{x + 1} 7l3 6m0-6l-3 6", "class": "cross"}) if status == "failed" else ""
        parts.append(element("g", None, element("rect", box), cross, words))
    label = ", ".join(f"{count} {status}" for status, count in told.items() if count)
    width = max(len(shown), 1) * 6.0
    size: dict[str, Attribute] = {
        "viewBox": f"0 0 {width:g} 20",
        "width": width * 1.3,
        "class": "calendar",
        "role": "img",
    }
    return element("svg", {**size, "aria-label": label}, *parts)


def _changes(lines: Sequence[Series], nights: Mapping[int, Night]) -> str:
    """Every change of level of the final model, the newest first; those of other models are marked in their charts."""
    found = [
        (one.usable[after.first].night, one, before, after)
        for one in lines
        if one.model == FINAL
        for before, after in pairwise(one.levels)
    ]
    rows = []
    for first, one, before, after in sorted(found, key=lambda item: -item[0]):
        label = nights[first].label if first in nights else f"night {first}"
        values = f"{format_value(one.described, before.value)} \u2192 {format_value(one.described, after.value)}"
        state = change_state(one, before, after)
        new = "; ".join(suspects(nights, one.entry, first))
        cells = [
            element("td", {"class": "left wrap", "data-head": ""}, escape(one.described.title)),
            element("td", {"class": "left", "data-head": "on"}, escape(one.target)),
            element("td", {"class": "left wrap", "data-head": "since"}, escape(label)),
            element("td", {"data-head": ""}, escape(values)),
            element("td", {"class": "left wrap", "data-head": ""}, escape(new)),
            cell(tag("strong", state, escape(change_words(one, before, after)))),
        ]
        rows.append(tag("tr", "", row_head(one.entry), *cells))
    heads = ("Entry", "Metric", "Target", "Since", "Level", "New that night", "Size")
    return table(heads, rows, "stack", left=(1, 2, 3, 5)) if rows else ""


def _filters(lines: Sequence[Series]) -> str:
    """Choices of what to see; shown by the script, which they need."""
    if not lines:
        return tag("p", "quiet", "Nothing was measured yet.")
    metrics = {one.metric: one.described.title for one in lines}
    models = list(dict.fromkeys(one.model for one in lines))
    hosts = {one.host.digest: one.host.words for one in lines}
    every = "Every one"
    parts = [
        _select("Entry", "entry", {"": every, **{one.entry: one.entry for one in lines}}),
        _select("Metric", "metric", {"*main": "The main ones", "": every, **metrics}),
        _select("Model", "model", {"": every, **{model: model for model in models}}, FINAL if FINAL in models else ""),
        _select("Target", "target", {"": every, **{one.target: one.target for one in lines}}),
        _select("Host", "host", {"": every, **hosts}) if len(hosts) > 1 else "",
        tag("label", "check", element("input", {"type": "checkbox", "name": "changed"}), "only what changed or failed"),
        tag("output", ""),
    ]
    return element("form", {"class": "card filters", "hidden": ""}, *parts)


def _select(heading: str, name: str, options: Mapping[str, str], chosen: str | None = None) -> str:
    listed = [
        element("option", {"value": value, "selected": "" if value == chosen else None}, escape(words))
        for value, words in options.items()
    ]
    return tag("label", "", escape(heading), element("select", {"name": name}, *listed))


def _trends(lines: Sequence[Series], nights: Mapping[int, Night]) -> str:
    several_hosts = len({one.host.digest for one in lines}) > 1
    ordered = sorted(lines, key=lambda one: not is_main(one))
    return tag("div", "trends", *(_panel(one, nights, several_hosts) for one in ordered)) if lines else ""


def _panel(series: Series, nights: Mapping[int, Night], several_hosts: bool) -> str:
    failed = {
        number
        for number, night in nights.items()
        if series.model == FINAL
        and any(
            (found.entry, found.metric, found.target) == (series.entry, series.metric, series.target)
            for found in night.findings
        )
    }
    kept = {
        "entry": series.entry,
        "metric": series.metric,
        "model": series.model,
        "target": series.target,
        "host": series.host.digest,
        "main": "1" if is_main(series) else "0",
        "changed": "1" if len(series.levels) > 1 or failed & {point.night for point in series.points} else "0",
    }
    last = format_value(series.described, series.points[-1].value)
    heading = tag("h3", "", tag("span", "", escape(series.described.title)), tag("span", "quiet", escape(last)))
    where = [series.entry, series.model, f"on {series.target}", *([series.host.words] if several_hosts else [])]
    caption = element("figcaption", {"class": "quiet"}, escape(", ".join(where)))
    data = {f"data-{name}": value for name, value in kept.items()}
    drawn = trend_chart(series, nights, failed)
    return element("figure", {"class": "card panel", **data}, heading, caption, drawn)
