"""Views of a night: trend page with charts, console table, Markdown and JUnit cases."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Literal, NamedTuple, get_args

from rich.console import Group, RenderableType
from rich.text import Text

from compress.plugins.nightly.drift import MACHINE, REFERENCE, changes_on_night, night_label
from compress.plugins.nightly.entry_run import relative
from compress.plugins.nightly.record import EntryOutcome, Night, Status
from compress.plugins.nightly.run import NightResult
from compress.plugins.nightly.trend import Series, TrendPoint
from compress.report.junit import JunitCase, JunitSuite, junit_xml
from compress.report.pages import render, render_markdown
from compress.report.plot import Frame, Plot, Scale, element, line, polyline_points, scale_around, text, with_tooltip
from compress.report.run_folder import update_latest_link, write_atomically
from compress.results.formatting import format_interval, format_number, format_seconds, format_value
from compress.results.metrics import main_metrics
from compress.results.report import FINAL
from compress.utils.responsive_table import ResponsiveTable, TableColumn
from compress.utils.storage import storage_errors

_PAGE = "night.html"
_STYLES = {"passed": "green", "missed": "bold red", "failed": "bold red", "not run": "yellow"}


def night_table(night: Night) -> RenderableType:
    """Return the outcomes as a table, then every finding with its culprit, then the notes."""
    columns = [TableColumn("Entry"), TableColumn("Verdict"), TableColumn("Time", right=True, rank=1)]
    columns.append(TableColumn("Outcome"))
    table = ResponsiveTable(f"{night.suite}, {night.label}", columns)
    for outcome in night.outcomes:
        table.add(outcome.entry, (outcome.status, _STYLES[outcome.status]), _duration(outcome), outcome.short_reason)
    parts: list[RenderableType] = [table]
    parts += [Text(f"\u2717 {finding.sentence}", style="red") for finding in night.findings]
    parts += [Text(note, style="yellow") for note in night.all_notes]
    parts.append(Text(_sentence(night), style=_STYLES[verdict(night)[0]]))
    return Group(*parts)


def night_markdown(night: Night) -> str:
    """Return verdict, culprits, entries and notes as Markdown."""
    rows = [(outcome.entry, outcome.status, _duration(outcome), outcome.short_reason) for outcome in night.outcomes]
    return render_markdown("plugins/nightly/templates/night.md", night=night, verdict=_sentence(night), rows=rows)


def _sentence(night: Night) -> str:
    _, sentence = verdict(night)
    return f"{sentence[:1].upper()}{sentence[1:]}."


def night_junit(night: Night) -> str:
    """Return one JUnit suite per entry: a case for its run, and one for each finding of gate, limit and drift.

    An entry that failed is an error, one that missed a limit a failure, and one that did not run is skipped.
    """
    suites = []
    states: dict[str, Literal["error", "skipped"]] = {"failed": "error", "not run": "skipped"}
    for outcome in night.outcomes:
        classname, state = f"{night.suite}.{outcome.entry}", states.get(outcome.status)
        reason = outcome.reason if state else ""
        cases = [JunitCase(classname, "run", state or "passed", reason, reason, seconds=outcome.seconds)]
        for finding in night.findings:
            if finding.entry == outcome.entry and finding.kind in ("gate", "limit", "drift"):
                name = f"{finding.kind} {finding.metric or ''} {finding.target or ''}".strip()
                cases.append(JunitCase(classname, name, "failure", finding.sentence, finding.sentence, finding.kind))
        suites.append(JunitSuite(outcome.entry, cases, outcome.seconds, night.started))
    return junit_xml(night.suite, suites, night.seconds)


def _duration(outcome: EntryOutcome) -> str:
    return format_seconds(outcome.seconds) if outcome.seconds else ""


def write_night(result: NightResult, description: str = "") -> None:
    """Write night.json, night.md, junit.xml and night.html, then point `latest` to them. Raises `StorageError`.

    The page shows every night, so that the pages of earlier nights are removed: their size grows with each night.
    """
    contents = {
        "night.json": night_json(result),
        "night.md": night_markdown(result.night),
        "junit.xml": night_junit(result.night),
        _PAGE: night_page(result.night, result.nights, result.series, description),
    }
    for name, content in contents.items():
        write_atomically(result.folder / name, content)
    with storage_errors(result.folder):
        update_latest_link(result.folder)
        for page in result.folder.parent.glob(f"*/{_PAGE}"):
            if not page.parent.samefile(result.folder):
                page.unlink(missing_ok=True)


def night_json(result: NightResult) -> str:
    """Return the night as JSON, with its exit code and folder."""
    content = result.night.model_dump(mode="json")
    content |= {"exit_code": result.night.exit_code, "folder": relative(result.folder)}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


MOST_NIGHTS = 180
"""Number of nights on the page. Older ones stay in the history only, since the page would be too large to open."""
_CALENDAR_NIGHTS = 60
_STATES: tuple[Status, ...] = get_args(Status)


def night_page(night: Night, nights: Sequence[Night], series: Sequence[Series], description: str = "") -> str:
    """Return the whole page.

    Args:
        night: Night of the page.
        nights: All nights of the suite in their order.
        series: All series of the suite.
        description: Description of the suite.
    """
    # Older nights would make the page too large to open.
    recent = {past.number for past in nights[-MOST_NIGHTS:]}
    by_series = [(line, tuple(point for point in line.points if point.night in recent)) for line in series]
    lines = [line if points == line.points else replace(line, points=points) for line, points in by_series if points]
    by_number = {past.number: past for past in nights}
    hosts = {line.host.digest: line.host.words for line in lines}
    models = {line.model: line.model for line in lines}
    every = {"": "Every one"}
    # The table lists changes of the shipped model only. Charts show all models.
    changes = [change for line in lines if line.model == FINAL for change in level_changes(line, by_number)]
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
            "entry": every | {line.entry: line.entry for line in lines},
            "metric": {"*main": "The main ones"} | every | {line.metric: line.described.title for line in lines},
            "model": every | models,
            "target": every | {line.target: line.target for line in lines},
            "host": every | hosts,
        },
        chosen_model=FINAL if FINAL in models else "",
        panels=[_panel(line, by_number, len(hosts) > 1) for line in sorted(lines, key=lambda line: not is_main(line))],
        changes=sorted(changes, key=lambda change: -change.first),
    )


def verdict(night: Night) -> tuple[str, str]:
    """Return a state and a sentence: (`missed`, `1 of 3 entries missed`)."""
    counts = {state: sum(outcome.status == state for outcome in night.outcomes) for state in _STATES}
    # List the worst states first.
    problems = [f"{counts[state]} {state}" for state in ("failed", "missed", "not run") if counts[state]]
    total = len(night.outcomes)
    if not problems:
        return "passed", f"all {total} entries passed" if total > 1 else "the entry passed"
    return "missed", f"{', '.join(problems)} of {total} {'entries' if total > 1 else 'entry'}"


def is_main(series: Series) -> bool:
    """Return whether a series belongs to a main metric of the report, or to a reference kernel."""
    if series.model == MACHINE:
        return series.metric.startswith(REFERENCE)
    return series.metric in {metric.name for metric in main_metrics({series.metric: series.unit})}


def _entry(outcome: EntryOutcome, nights: Sequence[Night]) -> dict[str, object]:
    """Return the outcome of an entry tonight, and its status in each of the ``nights``."""
    past = (night.outcome(outcome.entry) for night in nights)
    statuses: list[Status] = [other.status if other else "not run" for other in past]
    counts = Counter(statuses)
    return {
        "outcome": outcome,
        "reason": outcome.short_reason,
        "calendar": list(zip((night.label for night in nights), statuses, strict=True)),
        "counted": ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state]),
    }


def _panel(series: Series, nights: Mapping[int, Night], several_hosts: bool) -> dict[str, object]:
    """Return a series with its chart, and the values that the page's filters use."""
    subject = (series.entry, series.metric, series.target)
    failed = {
        number
        for number, night in nights.items()
        if series.model == FINAL
        and any((finding.entry, finding.metric, finding.target) == subject for finding in night.findings)
    }
    # The page can show only the series that changed or failed.
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


_FRAME = Frame(480.0, 214.0, 68.0, 464.0, 42.0, 188.0)


class LevelChange(NamedTuple):
    """Change of level in readable form: its first night, size, values, and what else changed in that night."""

    series: Series
    first: int
    since: str
    values: str
    new: str
    state: Literal["worse", "better", "other"]
    words: str


def level_changes(series: Series, nights: Mapping[int, Night]) -> list[LevelChange]:
    """Return every change of level in the order of nights. Its state is `other` if the metric has no direction."""
    changes, metric = [], series.described
    for before, after in pairwise(series.levels):
        first, effect = series.usable[after.first].night, series.effect(before.value, after.value)
        loss = series.loss(effect)
        change = LevelChange(
            series,
            first,
            night_label(nights, first),
            f"{format_value(metric, before.value)} \u2192 {format_value(metric, after.value)}",
            "; ".join(changes_on_night(nights, series.entry, first)),
            "worse" if loss > 0 else "better" if loss < 0 else "other",
            series.written(effect),
        )
        changes.append(change)
    return changes


def trend_chart(series: Series, nights: Mapping[int, Night], failed: AbstractSet[int]) -> str:
    """Return the chart of a series as SVG: values with their interval band, levels, and marked changes.

    ``failed`` holds the numbers of nights whose gate this metric failed.
    """
    points, metric = series.points, series.described
    first, last = points[0].night, points[-1].night
    # One night alone still gets a width.
    x = Scale(first - 0.5, max(last, first + 1) + 0.5, _FRAME.left, _FRAME.right)
    values = [value for point in series.points for value in (point.value, point.low, point.high) if value is not None]
    middle = series.levels[-1].value if series.levels else series.points[-1].value
    # The axis has a least height, so that noise in the last digit does not look large.
    span = 0.01 if series.is_share else 0.06 * abs(middle)
    plot = Plot(_FRAME, x, scale_around([*values, middle - span / 2, middle + span / 2], _FRAME.bottom, _FRAME.top))
    # A long unit is left out, since the heading shows it.
    plot.y_axis(
        "", lambda value: format_number(value) if metric.style in ("rate", "plain") else format_value(metric, value), 4
    )
    plot.x_axis_line()
    _days(plot, points)
    # Draw the interval band as one polygon per stretch of nights that have an interval.
    for has_interval, stretch in groupby(points, lambda point: point.low is not None and point.high is not None):
        if has_interval:
            ends = [(point.night, point.low or 0.0, point.high or 0.0) for point in stretch]
            corners = [(night, high) for night, _, high in ends] + [(night, low) for night, low, _ in reversed(ends)]
            plot.add(element("polygon", {"points": polyline_points(map(plot.at, corners)), "class": "band"}))
    for level in series.levels:
        start, end = series.usable[level.first].night - 0.4, series.usable[level.last].night + 0.4
        plot.add(plot.straight((start, level.value), (end, level.value), "level"))
    plot.add(plot.line([(point.night, point.value) for point in points], "curve"))
    _changes(plot, level_changes(series, nights))
    for point in points:
        plot.add(_point(plot, series, point, night_label(nights, point.night), point.night in failed))
    nights_shown = f"{len(points)} night{'s' * (len(points) != 1)}"
    return plot.svg(f"{metric.title} of {series.model} of {series.entry} over {nights_shown}")


def _days(plot: Plot, points: Sequence[TrendPoint]) -> None:
    """Label up to four nights below the axis with their dates."""
    count, end = min(4, len(points)), len(points) - 1
    for index in sorted({round(step * end / max(1, count - 1)) for step in range(count)}):
        x, last = plot.x(points[index].night), index == end > 0
        anchor = "end" if last else "start" if index == 0 < end else "middle"
        plot.add(line(x, _FRAME.bottom, x, _FRAME.bottom + 4, "axis"))
        plot.add(text(x + (8 if last else 0), _FRAME.bottom + 19, points[index].started[5:10], "tick", anchor))


def _changes(plot: Plot, changes: Sequence[LevelChange]) -> None:
    """Mark the first night of each new level, with its size above. Labels that would overlap use a second row."""
    ends = [-1e9, -1e9]
    for change in changes:
        at, half = plot.x(change.first - 0.5), 29.0
        middle = min(max(at, _FRAME.left + half), _FRAME.right - half)
        # A label that would overlap the last one of its row goes to the other row.
        row = 0 if middle - half >= ends[0] else 1
        ends[row] = middle + half
        down = _FRAME.top - 10 - 16 * row
        words = [f"{change.words} since {change.since}", change.values, *change.new.split("; ")]
        mark, size = line(at, down + 4, at, _FRAME.bottom, "mark"), text(middle, down, change.words, "size")
        plot.add(with_tooltip(f"change {change.state}", "\n".join(filter(None, words)), mark, size))


def _point(plot: Plot, series: Series, point: TrendPoint, label: str, failed: bool) -> str:
    metric = series.described
    interval = format_interval(metric, point.low, point.high)
    words = f"{label}\n{format_value(metric, point.value)}" + (f" ({interval})" if interval else "")
    words += "\nthe gate failed" if failed else ""
    disturbed = point not in series.usable
    words += "\nthe machine was too disturbed: not judged" if disturbed else ""
    radius = (4.5 if failed else 1.8) if len(series.points) > 60 else (5.5 if failed else 3.0)
    css_class = f"point{' failed' if failed else ''}{' disturbed' if disturbed else ''}"
    # Hundreds of points show their tooltip to a pointer only. A keyboard moves from change to change.
    return plot.dot((point.night, point.value), radius, css_class, words, focus="-1")
