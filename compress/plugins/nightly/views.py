"""A night as its trend page, for the console, as Markdown and as JUnit cases; and writing them into its folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from rich.console import Group, RenderableType
from rich.text import Text

from compress.plugins.nightly.chart import level_changes, trend_chart
from compress.plugins.nightly.drift import MACHINE, REFERENCE
from compress.plugins.nightly.entry_run import relative
from compress.plugins.nightly.record import EntryOutcome, Night, Status, first_line
from compress.plugins.nightly.run import NightResult
from compress.plugins.nightly.trend import Series
from compress.report.junit import JunitCase, JunitSuite, junit_xml
from compress.report.pages import render, render_markdown
from compress.report.run_folder import update_latest_link, write_atomically
from compress.results.formatting import format_seconds, format_value
from compress.results.metrics import main_metrics
from compress.results.report import FINAL
from compress.utils.responsive_table import ResponsiveTable, TableColumn
from compress.utils.storage import storage_errors

_STYLES = {"passed": "green", "missed": "bold red", "failed": "bold red", "not run": "yellow"}


def night_table(night: Night) -> RenderableType:
    """The outcomes as a table, then every finding with its culprit, then the notes."""
    columns = [
        TableColumn("Entry"),
        TableColumn("Verdict"),
        TableColumn("Time", right=True, rank=1),
        TableColumn("Outcome"),
    ]
    table = ResponsiveTable(f"{night.suite}, {night.label}", columns)
    for outcome in night.outcomes:
        table.add(outcome.entry, (outcome.status, _STYLES[outcome.status]), _took(outcome), first_line(outcome.reason))
    parts: list[RenderableType] = [table]
    parts += [Text(f"\u2717 {found.sentence}", style="red") for found in night.findings]
    parts += [Text(note, style="yellow") for note in night.all_notes]
    parts.append(Text(_sentence(night), style=_STYLES[verdict(night)[0]]))
    return Group(*parts)


def night_markdown(night: Night) -> str:
    """Verdict, culprits, entries and notes."""
    rows = [(one.entry, one.status, _took(one), first_line(one.reason)) for one in night.outcomes]
    return render_markdown("plugins/nightly/templates/night.md", night=night, verdict=_sentence(night), rows=rows)


def _sentence(night: Night) -> str:
    _, sentence = verdict(night)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def night_junit(night: Night) -> str:
    """A suite an entry: one case for its run, and one for each finding of gate, limit and drift.

    What failed is an error, what missed a failure, what was not run is skipped.
    """
    return junit_xml(night.suite, [_suite(night, outcome) for outcome in night.outcomes], night.seconds)


def _suite(night: Night, outcome: EntryOutcome) -> JunitSuite:
    classname = f"{night.suite}.{outcome.entry}"
    state: Literal["error", "skipped", "passed"] = "passed"
    if outcome.status in ("failed", "not run"):
        state = "error" if outcome.status == "failed" else "skipped"
    reason = "" if state == "passed" else outcome.reason
    cases = [JunitCase(classname, "run", state, reason, reason, seconds=outcome.seconds)]
    for found in night.findings:
        if found.entry == outcome.entry and found.kind in ("gate", "limit", "drift"):
            name = f"{found.kind} {found.metric or ''} {found.target or ''}".strip()
            cases.append(JunitCase(classname, name, "failure", found.sentence, found.sentence, found.kind))
    return JunitSuite(outcome.entry, cases, outcome.seconds, night.started)


def _took(outcome: EntryOutcome) -> str:
    return format_seconds(outcome.seconds) if outcome.seconds else ""


def write_night(done: NightResult, description: str = "") -> None:
    """Write night.json, night.md, junit.xml and night.html, then turn `latest` to them. Raises `StorageError`."""
    contents = {
        "night.json": night_json(done),
        "night.md": night_markdown(done.night),
        "junit.xml": night_junit(done.night),
        "night.html": night_page(done.night, done.nights, done.series, description),
    }
    for name, content in contents.items():
        write_atomically(done.folder / name, content)
    with storage_errors(done.folder):
        update_latest_link(done.folder)


def night_json(done: NightResult) -> str:
    """The night as JSON, with its exit code and where its files lie."""
    content = done.night.model_dump(mode="json")
    whole = {**content, "exit_code": done.night.exit_code, "folder": relative(done.folder)}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


MOST_NIGHTS = 180
"""Number of nights on the page. Older ones stay in the history only, since the page would be too large to open."""
_CALENDAR_NIGHTS = 60
_STATES: tuple[Status, ...] = get_args(Status)


def night_page(night: Night, nights: Sequence[Night], series: Sequence[Series], description: str = "") -> str:
    """The whole page. ``nights`` are all of the suite in their order; ``series`` all of its lines."""
    recent = {one.number for one in nights[-MOST_NIGHTS:]}
    lines = [short for one in series if (short := _recent(one, recent)) is not None]
    by_number = {one.number: one for one in nights}
    hosts = {one.host.digest: one.host.words for one in lines}
    models = {one.model: one.model for one in lines}
    every = {"": "Every one"}
    changes = [change for one in lines if one.model == FINAL for change in level_changes(one, by_number)]
    return render(
        "plugins/nightly/templates/night.html",
        f"{night.suite}, {night.label} \u00b7 compress nightly",
        json.dumps(night.model_dump(mode="json"), ensure_ascii=False),
        night=night,
        count=len(nights),
        verdict=verdict(night),
        moment=f"{night.started[:16].replace('T', ' ')} {night.started[19:]}".strip(),
        description=description,
        entries=[_entry(outcome, nights[-_CALENDAR_NIGHTS:]) for outcome in night.outcomes],
        calendar_nights=min(len(nights), _CALENDAR_NIGHTS),
        choices={
            "entry": every | {one.entry: one.entry for one in lines},
            "metric": {"*main": "The main ones"} | every | {one.metric: one.described.title for one in lines},
            "model": every | models,
            "target": every | {one.target: one.target for one in lines},
            "host": every | hosts,
        },
        chosen_model=FINAL if FINAL in models else "",
        panels=[_panel(one, by_number, len(hosts) > 1) for one in sorted(lines, key=lambda one: not is_main(one))],
        changes=sorted(changes, key=lambda change: -change.first),
    )


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


def _entry(outcome: EntryOutcome, nights: Sequence[Night]) -> dict[str, Any]:
    """What became of an entry tonight, and in each of the ``nights``."""
    found = [{one.entry: one.status for one in night.outcomes}.get(outcome.entry, "not run") for night in nights]
    counts = Counter(found)
    return {
        "outcome": outcome,
        "reason": first_line(outcome.reason),
        "calendar": list(zip((night.label for night in nights), found, strict=True)),
        "counted": ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state]),
    }


def _panel(series: Series, nights: Mapping[int, Night], several_hosts: bool) -> dict[str, Any]:
    """A line with its chart, and the values that the page's filters look at."""
    mine = (series.entry, series.metric, series.target)
    failed = {
        number
        for number, night in nights.items()
        if series.model == FINAL and any((found.entry, found.metric, found.target) == mine for found in night.findings)
    }
    changed = len(series.levels) > 1 or not failed.isdisjoint(point.night for point in series.points)
    names = ("entry", "metric", "model", "target")
    return {
        "heading": series.described.title,
        "last": format_value(series.described, series.points[-1].value),
        "where": ", ".join(
            [series.entry, series.model, f"on {series.target}", *([series.host.words] if several_hosts else [])]
        ),
        "drawing": trend_chart(series, nights, failed),
        "data": {f"data-{name}": getattr(series, name) for name in names}
        | {"data-host": series.host.digest, "data-main": int(is_main(series)), "data-changed": int(changed)},
    }
