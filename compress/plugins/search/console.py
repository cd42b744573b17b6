"""Console tables of a search: the live table while it runs, and the result at its end."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from compress.plugins.search.formatting import format_margin, format_metric, format_model, format_objectives
from compress.plugins.search.progress import RunningTrial, SearchSnapshot
from compress.plugins.search.record import SearchRecord, prediction_error_lines
from compress.results.formatting import format_seconds, format_value
from compress.results.metrics import describe_metric
from compress.utils.responsive_table import ResponsiveTable, TableColumn

_FRONT = 8
"""Largest number of Pareto-optimal recipes in the live table, so that the rest fits on a small terminal."""


@dataclass
class LiveTable:
    """Live table of a search, drawn for the present second and the present width of the console."""

    seen: SearchSnapshot
    clock: Callable[[], float] = time.monotonic

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        seen, now = self.seen, self.clock()
        record = seen.record
        objective = f"{' and '.join(describe_metric(name).title.lower() for name in record.minimize)} minimized"
        yield Text(f"{record.name}: {objective}; {', '.join(record.limits) or 'no limits'}", style="bold")
        rows = Table.grid(padding=(0, 2, 0, 0))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(overflow="fold")
        for name, lines in (("best", _best(record)), ("now", _now(seen, now)), ("trials", [_counts(record)]),
                            ("left", [_left(seen, now)])):  # fmt: skip
            for index, line in enumerate(lines):
                rows.add_row("" if index else name, line)
        front = _front(record)
        if front is not None:
            yield front
        yield rows


def _best(record: SearchRecord) -> list[Text]:
    trial = next((record_trial for record_trial in record.trials if record_trial.status == "best"), None)
    if trial is None:
        nearest = f" Nearest: {record.nearest}" if record.nearest else ""
        return [Text(f"nothing keeps every limit yet.{nearest}")]
    figures = format_objectives(record.minimize, trial.final, trial.spread)
    margins = [format_margin(room.limit, room.value, room.low) for room in trial.rooms]
    return [Text(", ".join(figures), style="green"), *map(Text, margins), Text(f"trial {trial.number}: {trial.words}")]


def _front(record: SearchRecord) -> RenderableType | None:
    """Return a table of the Pareto-optimal recipes where two objectives are minimized."""
    front = [trial for trial in record.trials if trial.status in ("best", "front")]
    if len(record.minimize) < 2 or not front:
        return None
    front.sort(key=lambda trial: trial.final.get(record.minimize[0], math.inf))
    columns = [
        TableColumn("", right=True),
        *(TableColumn(describe_metric(name).title, right=True) for name in record.minimize),
        TableColumn("Surely inside", right=True),
        TableColumn("Differs in", rank=1),
    ]
    more = f", {len(front) - _FRONT} more in search.html" if len(front) > _FRONT else ""
    table = ResponsiveTable(f"the front{more}", columns)
    for trial in front[:_FRONT]:
        least_margin = min((room.low for room in trial.rooms), default=None)
        figures = [format_metric(name, trial.final.get(name)) for name in record.minimize]
        table.add(f"{trial.number}", *figures, "" if least_margin is None else f"{least_margin:+.2%}", trial.words,
                  style="green" if trial.status == "best" else "")  # fmt: skip
    return table


def _now(seen: SearchSnapshot, now: float) -> list[Text]:
    lines = [Text(seen.doing)] if seen.doing else []
    for running in seen.trying:
        share = "" if running.share == 1 else f", {running.share:.0%} of its training"
        lines.append(Text(f"trial {running.number}{share}, for {_clock(now - running.since)}: {running.words}"))
        lines.append(Text(f"  {describe_running_trial(running)}", style="dim"))
    return lines or [Text("deciding what is next")]


def describe_running_trial(trial: RunningTrial) -> str:
    """Describe why a trial is tried, and its expected gain."""
    expected, parts = trial.expected, list[str]()
    if expected is not None:
        if expected.gain is not None:
            parts.append(f"{expected.gain:.1%} to win")
        if expected.probability is not None:
            parts.append(f"{expected.probability:.0%} to keep the limits on quality")
        parts.append(f"about {format_seconds(expected.seconds)} to its end")
    return trial.why + (f": {', '.join(parts)}" if parts else "")


def _counts(record: SearchRecord) -> Text:
    """Count recipes by the state of their last trial."""
    last = {trial.point: trial for trial in record.trials}
    states = Counter(
        "failed" if last_trial.status == "failed" else "ended early" if last_trial.status == "given up"
        else "in full" if last_trial.share == 1 else "on their way" for last_trial in last.values()
    )  # fmt: skip
    parts = [f"{states[name]} {name}" for name in ("in full", "ended early", "failed", "on their way") if states[name]]
    left = "" if record.left is None else f"; predictions leave {record.left:,} more"
    recipes = f"{len(last)} of {record.size:,} recipes"
    return Text(f"{len(record.trials)} done, {recipes}: {', '.join(parts) or 'none yet'}{left}")


def _left(seen: SearchSnapshot, now: float) -> Text:
    left = max(seen.left - (now - seen.moment), 0.0)
    return Text(f"{_clock(left)} for trials, of {_clock(seen.record.budget_seconds)} for all")


def _clock(seconds: float) -> str:
    """Format seconds as `1:02:03` or `4:05`."""
    minutes, remainder = divmod(max(round(seconds), 0), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{remainder:02d}" if hours else f"{minutes}:{remainder:02d}"


def search_table(record: SearchRecord) -> RenderableType:
    """Return a table of the final evaluation, or of the trials where there was none, then the conclusions."""
    parts: list[RenderableType] = []
    if record.final is not None:
        names = [describe_metric(name) for name in record.minimize]
        columns = [
            TableColumn("Model"),
            *(TableColumn(model.title, right=True) for model in names),
            TableColumn("Limits"),
            TableColumn("Differs in", rank=1),
        ]
        table = ResponsiveTable(f"{record.name}: the test rows, read once", columns)
        for model in record.final.judged:
            shown = format_model(model, record.minimize)
            table.add(
                model.name, *shown.figures, (shown.verdict, "green" if model.meets_limits else "bold red"), model.words
            )
        parts.append(table)
    for line in closing_lines(record):
        parts.append(Text(line, style="green" if line.startswith("✓") else ""))
    return Group(*parts)


def closing_lines(record: SearchRecord) -> list[str]:
    """Return the lines that conclude a search."""
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
