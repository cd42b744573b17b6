"""A night for the console, as Markdown and as JUnit cases."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree

from rich.console import Group, RenderableType
from rich.text import Text

from compress.fitted_table import Column, FittedTable
from compress.metrics import format_seconds
from compress.nightly.page import verdict
from compress.nightly.record import Finding, Night, Outcome, first_line
from compress.report.junit import plain_xml
from compress.report.markdown import escape_markdown, markdown_table

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
    state, sentence = verdict(night)
    parts.append(Text(f"{sentence[:1].upper()}{sentence[1:]}.", style=_STYLES[state]))
    return Group(*parts)


def night_markdown(night: Night) -> str:
    """Verdict, culprits, entries and notes."""
    return "\n".join(_markdown(night)).rstrip() + "\n"


def _markdown(night: Night) -> Iterator[str]:
    _, sentence = verdict(night)
    yield f"# {escape_markdown(f'{night.suite}, {night.label}')}"
    yield from ("", f"**{escape_markdown(sentence[:1].upper() + sentence[1:])}.** {escape_markdown(night.host.words)}")
    yield ""
    yield from (f"- **{escape_markdown(found.culprit)}**: {_rest(found)}" for found in night.findings)
    yield from ("", "## Entries", "")
    rows = [(one.entry, one.status, _took(one), first_line(one.reason)) for one in night.outcomes]
    yield from markdown_table(("Entry", "Verdict", "Time", "Outcome"), rows, left=(0, 1, 3))
    if night.all_notes:
        yield from ("", "## Notes", "")
        yield from (f"- {escape_markdown(note)}" for note in night.all_notes)


def _rest(found: Finding) -> str:
    return escape_markdown(found.what + (f", since {found.since}" if found.since else ""))


def night_junit(night: Night) -> str:
    """A suite an entry: one case for its run, and one for each finding of gate, limit and drift.

    What failed is an error, what missed a failure, what was not run is skipped.
    """
    root = ElementTree.Element("testsuites", {"name": plain_xml(night.suite), "time": f"{night.seconds:.3f}"})
    for outcome in night.outcomes:
        mine = [found for found in night.findings if found.entry == outcome.entry]
        misses = [found for found in mine if found.kind in ("gate", "limit", "drift")]
        failed, idle = outcome.status == "failed", outcome.status == "not run"
        counts = {"tests": 1 + len(misses), "failures": len(misses), "errors": int(failed), "skipped": int(idle)}
        attributes = {name: str(count) for name, count in counts.items()}
        attributes |= {
            "name": plain_xml(outcome.entry),
            "time": f"{outcome.seconds:.3f}",
            "timestamp": night.started,
        }
        suite = ElementTree.SubElement(root, "testsuite", attributes)
        case = _case(suite, night, outcome.entry, "run", outcome.seconds)
        if failed or idle:
            kind = "error" if failed else "skipped"
            message = plain_xml(outcome.reason)
            ElementTree.SubElement(case, kind, {"message": message}).text = message
        for found in misses:
            name = f"{found.kind} {found.metric or ''} {found.target or ''}".strip()
            case = _case(suite, night, outcome.entry, name, 0.0)
            message = plain_xml(found.sentence)
            ElementTree.SubElement(case, "failure", {"message": message, "type": found.kind}).text = message
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _case(suite: ElementTree.Element, night: Night, entry: str, name: str, seconds: float) -> ElementTree.Element:
    names = {"classname": plain_xml(f"{night.suite}.{entry}"), "name": plain_xml(name), "time": f"{seconds:.3f}"}
    return ElementTree.SubElement(suite, "testcase", names)


def _took(outcome: Outcome) -> str:
    return format_seconds(outcome.seconds) if outcome.seconds else ""
