"""Console tables of a search: the live table while it runs, and the result at its end."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import RLock
from typing import Self, TypeVar

from rich.console import Console, ConsoleOptions, ConsoleRenderable, Group, RenderableType, RenderResult
from rich.control import Control
from rich.live import Live
from rich.progress import Progress
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from compress.plugins.search.acquisition import Expectation
from compress.plugins.search.record import (
    SearchRecord,
    format_margin,
    format_metric,
    format_objectives,
    prediction_error_lines,
)
from compress.report.progress import ConsoleProgress, bars
from compress.results.formatting import format_seconds, format_value
from compress.results.metrics import describe_metric
from compress.utils import terminal
from compress.utils.progress import Total, expected_steps, is_shown
from compress.utils.responsive_table import ResponsiveTable, TableColumn


@dataclass(frozen=True)
class RunningTrial:
    """Trial that runs now; ``since`` is a time of `time.monotonic`."""

    number: int
    words: str
    share: float
    why: str
    expected: Expectation | None
    since: float


@dataclass(frozen=True)
class SearchSnapshot:
    """State of a search at one moment.

    Attributes:
        record: Everything so far.
        trying: Trials that run now.
        left: Seconds for further trials.
        moment: Time of the snapshot (`time.monotonic`).
        doing: Work that is not a trial, such as the final evaluation.
    """

    record: SearchRecord
    trying: tuple[RunningTrial, ...]
    left: float
    moment: float
    doing: str = ""


class ProgressDisplay:
    """Display of a running search; this one shows nothing."""

    def show(self, seen: SearchSnapshot) -> None:
        """Show a snapshot until the next one."""

    def stop(self) -> None:
        """Leave the last snapshot in place; later output comes below it."""


_FRONT = 8
"""Largest number of Pareto-optimal recipes in the live table, so that the rest fits on a small terminal."""


@dataclass
class LiveTable:
    """Live table of a search, drawn for the present second and the present width of the console."""

    seen: SearchSnapshot
    clock: Callable[[], float] = time.monotonic

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # The clock is read at drawing time, so that durations advance between two snapshots.
        seen, now = self.seen, self.clock()
        record = seen.record
        objective = f"{' and '.join(describe_metric(name).title.lower() for name in record.minimize)} minimized"
        yield Text(f"{record.name}: {objective}; {', '.join(record.limits) or 'no limits'}", style="bold")
        rows = Table.grid(padding=(0, 2, 0, 0))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(overflow="fold")
        left = f"{_clock(seen.left - (now - seen.moment))} for trials, of {_clock(record.budget_seconds)} for all"
        for name, lines in (("best", _best(record)), ("now", _now(seen, now)), ("trials", [_counts(record)]),
                            ("left", [Text(left)])):  # fmt: skip
            for index, line in enumerate(lines):
                rows.add_row("" if index else name, line)
        yield from _front(record)
        yield rows


def _best(record: SearchRecord) -> list[Text]:
    trial = next((trial for trial in record.trials if trial.status == "best"), None)
    if trial is None:
        nearest = f" Nearest: {record.nearest}" if record.nearest else ""
        return [Text(f"no recipe meets every limit yet.{nearest}")]
    figures = format_objectives(record.minimize, trial.final, trial.spread)
    margins = [format_margin(room.limit, room.value, room.low) for room in trial.rooms]
    return [Text(", ".join(figures), style="green"), *map(Text, margins), Text(f"trial {trial.number}: {trial.words}")]


def _front(record: SearchRecord) -> Iterator[RenderableType]:
    """Yield a table of the Pareto-optimal recipes where two objectives are minimized."""
    front = [trial for trial in record.trials if trial.status in ("best", "front")]
    if len(record.minimize) < 2 or not front:
        return
    front.sort(key=lambda trial: trial.final.get(record.minimize[0], math.inf))
    columns = [TableColumn(name, right=True) for name in ("", *(describe_metric(m).title for m in record.minimize))]
    columns += [TableColumn("Surely inside", right=True), TableColumn("Differs in", rank=1)]
    more = f", {len(front) - _FRONT} more in search.html" if len(front) > _FRONT else ""
    table = ResponsiveTable(f"the front{more}", columns)
    for trial in front[:_FRONT]:
        # The smallest lower end of all margins shows how safely a recipe meets its limits.
        least_margin = min((room.low for room in trial.rooms), default=None)
        figures = [format_metric(name, trial.final.get(name)) for name in record.minimize]
        table.add(f"{trial.number}", *figures, "" if least_margin is None else f"{least_margin:+.2%}", trial.words,
                  style="green" if trial.status == "best" else "")  # fmt: skip
    yield table


def _now(seen: SearchSnapshot, now: float) -> list[Text]:
    lines = [Text(seen.doing)] if seen.doing else []
    for running in seen.trying:
        share = "" if running.share == 1 else f", {running.share:.0%} of its training"
        lines.append(Text(f"trial {running.number}{share}, for {_clock(now - running.since)}: {running.words}"))
        lines.append(Text(f"  {describe_running_trial(running)}", style="dim"))
    return lines or [Text("planning the next trials")]


def describe_running_trial(trial: RunningTrial) -> str:
    """Describe why a trial is tried, and its expected gain."""
    expected = trial.expected
    if expected is None:
        return trial.why
    parts = [] if expected.gain is None else [f"{expected.gain:.1%} expected gain"]
    if expected.probability is not None:
        parts.append(f"{expected.probability:.0%} to meet the limits on quality")
    return f"{trial.why}: {', '.join([*parts, f'about {format_seconds(expected.seconds)} to its end'])}"


def _counts(record: SearchRecord) -> Text:
    """Count recipes by the state of their last trial."""
    last = {trial.point: trial for trial in record.trials}
    states = Counter(
        "failed" if last_trial.status == "failed" else "ended early" if last_trial.status == "given up"
        else "in full" if last_trial.share == 1 else "on their way" for last_trial in last.values()
    )  # fmt: skip
    parts = [f"{states[name]} {name}" for name in ("in full", "ended early", "failed", "on their way") if states[name]]
    left = "" if record.left is None else f"; {record.left:,} untried ones may meet the limits"
    recipes = f"{len(last)} of {record.size:,} recipes"
    return Text(f"{len(record.trials)} done, {recipes}: {', '.join(parts) or 'none yet'}{left}")


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
        columns = [TableColumn("Model"), *(TableColumn(metric.title, right=True) for metric in names)]
        columns += [TableColumn("Limits"), TableColumn("Differs in", rank=1)]
        table = ResponsiveTable(f"{record.name}: the test rows, read once", columns)
        for model in record.final.judged:
            values = [format_metric(name, model.final[name]) if name in model.final else "" for name in record.minimize]
            table.add(model.name, *values, (model.verdict, "green" if model.meets_limits else "bold red"), model.words)
        parts.append(table)
    for line in closing_lines(record):
        parts.append(Text(line, style="green" if line.startswith("✓") else ""))
    return Group(*parts)


def closing_lines(record: SearchRecord) -> list[str]:
    """Return the lines that conclude a search."""
    lines = []
    if record.unsure is not None:
        unsure = "No recipe meets every limit with confidence on the selection rows; evaluated is the safest"
        lines.append(f"{unsure}: {record.unsure}.")
    if record.final is not None:
        for limit in record.final.winner.limits:
            mark = "✓" if limit.passed else "?" if not limit.missed else "✗"
            ratio = f", {limit.ratio:.2%} of {limit.of}" if limit.ratio is not None else ""
            value = "" if limit.value is None else format_value(describe_metric(limit.metric), limit.value)
            reason = f" ({limit.reason})" if limit.reason else ""
            lines.append(f"{mark} {limit.metric} {limit.limit}: {value}{ratio}{reason}")
    elif record.ended:
        lines.append("No recipe meets every limit." + (f" Nearest: {record.nearest}." if record.nearest else ""))
    lines += prediction_error_lines(record)
    lines.append(
        f"{len(record.trials)} trials in {format_seconds(record.seconds)}, {record.stages_run} stages run and "
        f"{record.stages_shared} shared; {record.ended or 'running'}."
    )
    return lines


Item = TypeVar("Item")


class SearchConsole(ProgressDisplay):
    """Progress and display of a search. Notes scroll above the table, which stays in place after Ctrl-C."""

    def __init__(self, console: Console | None = None, lines: bool = False) -> None:
        """Open the display; with ``lines`` there is no table."""
        self._console = console or terminal.Console(stderr=True)
        self._draws = self._console.is_terminal and not lines and is_shown(logging.INFO)
        # Lines on a terminal are wrapped, and those of a file are not.
        self._lines = ConsoleProgress(self._console) if self._draws or console else ConsoleProgress()
        self._bars = Progress(*bars(), console=self._console)
        self._live: _Drawn | None = None
        self._table: RenderableType = ""
        self.lock = RLock()
        """Lock for drawing. One thread draws at a time, since the cursor goes back over the last table."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.stop()

    def show(self, seen: SearchSnapshot) -> None:
        """Draw the table."""
        if not self._draws:
            return
        self._table = LiveTable(seen)
        if self._live is None:
            self._live = _Drawn(self._console, self)
            self._live.start()
        self._live.refresh()

    def stop(self) -> None:
        """Stop drawing."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, message: str) -> None:
        """Print one line."""
        with self.lock:
            self._lines.note(message)

    def detail(self, message: str) -> None:
        """Print one line if `--verbose` was given."""
        with self.lock:
            self._lines.detail(message)

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` and show their progress as a bar below the table."""
        # Without a table, bars are drawn as in every other command.
        if self._live is None:
            yield from self._lines.track(items, description, total)
            return
        task = self._bars.add_task(description, total=expected_steps(total))
        try:
            for item in items:
                yield item
                self._bars.update(task, advance=1, total=expected_steps(total))
        finally:
            self._bars.remove_task(task)

    def __rich__(self) -> RenderableType:
        return Group(self._table, self._bars) if self._bars.tasks else self._table


class _Drawn(Live):
    """`Live` display whose table is not drawn twice after the terminal has become narrower.

    The terminal then wraps the lines that it shows, which takes more rows than `Live` goes back.
    """

    def __init__(self, console: Console, shown: SearchConsole) -> None:
        # The table is drawn twice a second, for its clocks.
        super().__init__(console=console, get_renderable=lambda: shown, refresh_per_second=2, vertical_overflow="crop")
        # The thread of `Live` and the notes share one lock.
        self._lock, self._drawn = shown.lock, list[int]()

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Return the output: cursor movement over the last table, then ``renderables``, then the table."""
        options = self.console.options
        wrapped = sum(max(math.ceil(cells / options.max_width), 1) - 1 for cells in self._drawn)
        # Erase the additional rows, one at a time, before `Live` goes back over the table.
        back = Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * wrapped)
        lines = self.console.render_lines(self.get_renderable(), options, pad=False)
        self._drawn = [sum(segment.cell_length for segment in line) for line in lines[: options.size.height]]
        return [back, *super().process_renderables(renderables)]
