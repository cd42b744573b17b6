"""A night for the console, as Markdown and as JUnit cases, and writing them into its folder."""

from __future__ import annotations

import json
from typing import Literal

from rich.console import Group, RenderableType
from rich.text import Text

from compress.cache import storage_errors
from compress.fitted_table import Column, FittedTable
from compress.metrics import format_seconds
from compress.nightly.entry_run import relative
from compress.nightly.page import night_page, verdict
from compress.nightly.record import Night, Outcome, first_line
from compress.nightly.run import NightDone
from compress.report.junit import Case, Suite, junit_xml
from compress.report.markdown import render_markdown
from compress.report.run_folder import point_latest
from compress.report.write import write_whole

_STYLES = {"passed": "green", "missed": "bold red", "failed": "bold red", "not run": "yellow"}


def night_table(night: Night) -> RenderableType:
    """The outcomes as a table, then every finding with its culprit, then the notes."""
    columns = [Column("Entry"), Column("Verdict"), Column("Time", right=True, rank=1), Column("Outcome")]
    table = FittedTable(f"{night.suite}, {night.label}", columns)
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
    return render_markdown("nightly/templates/night.md", night=night, verdict=_sentence(night), rows=rows)


def _sentence(night: Night) -> str:
    _, sentence = verdict(night)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def night_junit(night: Night) -> str:
    """A suite an entry: one case for its run, and one for each finding of gate, limit and drift.

    What failed is an error, what missed a failure, what was not run is skipped.
    """
    return junit_xml(night.suite, [_suite(night, outcome) for outcome in night.outcomes], night.seconds)


def _suite(night: Night, outcome: Outcome) -> Suite:
    classname = f"{night.suite}.{outcome.entry}"
    state: Literal["error", "skipped", "passed"] = "passed"
    if outcome.status in ("failed", "not run"):
        state = "error" if outcome.status == "failed" else "skipped"
    reason = "" if state == "passed" else outcome.reason
    cases = [Case(classname, "run", state, reason, reason, seconds=outcome.seconds)]
    for found in night.findings:
        if found.entry == outcome.entry and found.kind in ("gate", "limit", "drift"):
            name = f"{found.kind} {found.metric or ''} {found.target or ''}".strip()
            cases.append(Case(classname, name, "failure", found.sentence, found.sentence, found.kind))
    return Suite(outcome.entry, cases, outcome.seconds, night.started)


def _took(outcome: Outcome) -> str:
    return format_seconds(outcome.seconds) if outcome.seconds else ""


def write_night(done: NightDone, description: str = "") -> None:
    """Write night.json, night.md, junit.xml and night.html, then turn `latest` to them. Raises `StorageError`."""
    contents = {
        "night.json": night_json(done),
        "night.md": night_markdown(done.night),
        "junit.xml": night_junit(done.night),
        "night.html": night_page(done.night, done.nights, done.series, description),
    }
    for name, content in contents.items():
        write_whole(done.folder / name, content)
    with storage_errors(done.folder):
        point_latest(done.folder)


def night_json(done: NightDone) -> str:
    """The night as JSON, with its exit code and where its files lie."""
    content = done.night.model_dump(mode="json")
    whole = {**content, "exit_code": done.night.exit_code, "folder": relative(done.folder)}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"
