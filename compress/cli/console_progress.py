"""Progress bars and notes on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.text import Text

from compress.results.formatting import format_seconds
from compress.utils.progress import Total, expected_steps

Item = TypeVar("Item")

PERIOD_SECONDS = 30.0
"""Interval of progress lines where standard error is not a terminal."""


class _Rate(ProgressColumn):
    """Column with the steps per second, empty until known."""

    def render(self, task: Task) -> Text:
        """Return the rate as text."""
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def bars() -> tuple[ProgressColumn, ...]:
    """Return the columns of a progress bar: description, bar, steps, rate and time left."""
    text = TextColumn("{task.description}", markup=False)
    return text, BarColumn(), MofNCompleteColumn(), _Rate(), TimeLeft()


class ConsoleProgress:
    """Implementation of `Progress` with bars on a terminal, and occasional lines in files and pipes."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._clock = clock

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` while a bar shows steps, rate and time left; the bar goes away at the end."""
        if not self._console.is_terminal:
            yield from self._with_lines(items, description, total)
            return
        with Progress(*bars(), console=self._console, transient=True) as bar:
            task = bar.add_task(description, total=expected_steps(total))
            for item in items:
                yield item
                bar.update(task, advance=1, total=expected_steps(total))

    def _with_lines(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` and print a line with the time left every `PERIOD_SECONDS`."""
        began = last_line = self._clock()
        for done, item in enumerate(items, 1):
            yield item
            now, steps = self._clock(), expected_steps(total)
            if now - last_line >= PERIOD_SECONDS and done < steps:
                last_line = now
                seconds_left = (now - began) / done * (steps - done)
                self.note(f"{description}: {done} of {steps}, about {format_seconds(seconds_left)} left")

    def note(self, message: str) -> None:
        """Print one line."""
        self._console.print(message, markup=False)
