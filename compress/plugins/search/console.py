"""A search on a terminal: the table that changes while it goes on, and what was found at its end."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from compress.plugins.search.formatting import figure, format_margin, format_model, format_objectives
from compress.plugins.search.progress import RunningTrial, SearchSnapshot
from compress.plugins.search.record import SearchRecord, prediction_error_lines
from compress.results.formatting import format_seconds, format_value
from compress.results.metrics import describe_metric
from compress.utils.responsive_table import Column, ResponsiveTable

_FRONT = 8
"""As many recipes of the front are listed as leave room for the rest on a small terminal."""


@dataclass
class LiveTable:
    """A moment of a search, drawn for the second in which it is looked at and as wide as the console is then."""

    seen: SearchSnapshot
    clock: Callable[[], float] = time.monotonic

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        seen, now = self.seen, self.clock()
        record = seen.record
        about = f"{' and '.join(describe_metric(name).title.lower() for name in record.minimize)} minimized"
        yield Text(f"{record.name}: {about}; {', '.join(record.limits) or 'no limits'}", style="bold")
        rows = Table.grid(padding=(0, 2, 0, 0))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(overflow="fold")
        for name, lines in (("best", _best(record)), ("now", _now(seen, now)), ("trials", [_counts(record)]),
                            ("left", [_left(seen, now)])):  # fmt: skip
            for place, line in enumerate(lines):
                rows.add_row("" if place else name, line)
        front = _front(record)
        if front is not None:
            yield front
        yield rows


def _best(record: SearchRecord) -> list[Text]:
    trial = next((one for one in record.trials if one.status == "best"), None)
    if trial is None:
        nearest = f" Nearest: {record.nearest}" if record.nearest else ""
        return [Text(f"nothing keeps every limit yet.{nearest}")]
    figures = format_objectives(record.minimize, trial.final, trial.spread)
    rooms = [format_margin(room.limit, room.value, room.low) for room in trial.rooms]
    return [Text(", ".join(figures), style="green"), *map(Text, rooms), Text(f"trial {trial.number}: {trial.words}")]


def _front(record: SearchRecord) -> RenderableType | None:
    """Where two figures are minimized, every recipe that nothing beats in both."""
    found = [trial for trial in record.trials if trial.status in ("best", "front")]
    if len(record.minimize) < 2 or not found:
        return None
    found.sort(key=lambda trial: trial.final.get(record.minimize[0], math.inf))
    columns = [Column("", right=True), *(Column(describe_metric(name).title, right=True) for name in record.minimize),
               Column("Surely inside", right=True), Column("Differs in", rank=1)]  # fmt: skip
    more = f", {len(found) - _FRONT} more in search.html" if len(found) > _FRONT else ""
    table = ResponsiveTable(f"the front{more}", columns)
    for trial in found[:_FRONT]:
        nearest = min((room.low for room in trial.rooms), default=None)
        figures = [figure(name, trial.final.get(name)) for name in record.minimize]
        table.add(f"{trial.number}", *figures, "" if nearest is None else f"{nearest:+.2%}", trial.words,
                  style="green" if trial.status == "best" else "")  # fmt: skip
    return table


def _now(seen: SearchSnapshot, now: float) -> list[Text]:
    lines = [Text(seen.doing)] if seen.doing else []
    for one in seen.trying:
        share = "" if one.share == 1 else f", {one.share:.0%} of its training"
        lines.append(Text(f"trial {one.number}{share}, for {_clock(now - one.since)}: {one.words}"))
        lines.append(Text(f"  {why(one)}", style="dim"))
    return lines or [Text("deciding what is next")]


def why(one: RunningTrial) -> str:
    """Why a trial is tried, and what was expected of it."""
    expected, parts = one.expected, list[str]()
    if expected is not None:
        if expected.gain is not None:
            parts.append(f"{expected.gain:.1%} to win")
        if expected.probability is not None:
            parts.append(f"{expected.probability:.0%} to keep the limits on quality")
        parts.append(f"about {format_seconds(expected.seconds)} to its end")
    return one.why + (f": {', '.join(parts)}" if parts else "")


def _counts(record: SearchRecord) -> Text:
    """How trials ended, a recipe by the last of its rungs."""
    last = {trial.point: trial for trial in record.trials}
    states = Counter(
        "failed" if one.status == "failed" else "ended early" if one.status == "given up"
        else "in full" if one.share == 1 else "on their way" for one in last.values()
    )  # fmt: skip
    parts = [f"{states[name]} {name}" for name in ("in full", "ended early", "failed", "on their way") if states[name]]
    left = "" if record.left is None else f"; predictions leave {record.left:,} more"
    recipes = f"{len(last)} of {record.size:,} recipes"
    return Text(f"{len(record.trials)} done, {recipes}: {', '.join(parts) or 'none yet'}{left}")


def _left(seen: SearchSnapshot, now: float) -> Text:
    left = max(seen.left - (now - seen.moment), 0.0)
    return Text(f"{_clock(left)} for trials, of {_clock(seen.record.budget_seconds)} for all")


def _clock(seconds: float) -> str:
    """`1:02:03` or `4:05`, which ticks."""
    minutes, rest = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def search_table(record: SearchRecord) -> RenderableType:
    """The models of the last session, or what was tried where there was none; then what was found."""
    parts: list[RenderableType] = []
    if record.final is not None:
        names = [describe_metric(name) for name in record.minimize]
        columns = [Column("Model"), *(Column(one.title, right=True) for one in names), Column("Limits"),
                   Column("Differs in", rank=1)]  # fmt: skip
        table = ResponsiveTable(f"{record.name}: the test rows, read once", columns)
        for one in record.final.judged:
            shown = format_model(one, record.minimize)
            table.add(one.name, *shown.figures, (shown.verdict, "green" if one.meets_limits else "bold red"), one.words)
        parts.append(table)
    for line in closing_lines(record):
        parts.append(Text(line, style="green" if line.startswith("✓") else ""))
    return Group(*parts)


def closing_lines(record: SearchRecord) -> list[str]:
    """What a person should know at the end."""
    lines = []
    if record.unsure is not None:
        lines.append(
            f"No recipe surely keeps every limit by the rows that choose; judged is the surest: {record.unsure}."
        )
    if record.final is not None:
        for limit in record.final.winner.limits:
            mark = "✓" if limit.passed else "?" if not limit.missed else "✗"
            ratio = f", {limit.ratio:.2%} of {limit.of}" if limit.ratio is not None else ""
            value = "" if limit.value is None else format_value(describe_metric(limit.metric), limit.value)
            lines.append(
                f"{mark} {limit.metric} {limit.limit}: {value}{ratio}{f' ({limit.reason})' if limit.reason else ''}"
            )
    elif record.ended:
        lines.append("No recipe keeps every limit." + (f" Nearest: {record.nearest}." if record.nearest else ""))
    lines += prediction_error_lines(record)
    lines.append(
        f"{len(record.trials)} trials in {format_seconds(record.seconds)}, {record.stages_run} stages run and "
        f"{record.stages_shared} shared; {record.ended or 'going on'}."
    )
    return lines
