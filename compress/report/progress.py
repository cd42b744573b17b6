"""Progress bars and notes on standard error, for commands and for `progress=True` in Python."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.text import Text

from compress.results.formatting import format_seconds
from compress.utils.progress import Total, expected_steps, is_shown
from compress.utils.terminal import Console

Item = TypeVar("Item")

FIRST_SECONDS, PERIOD_SECONDS = 5.0, 30.0
"""Seconds before the first progress line, and between the next ones, where standard error is not a terminal."""


class _Rate(ProgressColumn):
    """Column with the steps per second, empty until known."""

    def render(self, task: Task) -> Text:
        """Return the rate as text."""
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def bars() -> tuple[ProgressColumn, ...]:
    """Return the columns of a progress bar: description, bar, steps, rate and time left."""
    text = TextColumn("{task.description}", markup=False)
    return text, BarColumn(), MofNCompleteColumn(), _Rate(), TimeLeft()


@dataclass(frozen=True)
class ConsoleProgress:
    """Implementation of `Progress` with bars on a terminal, and occasional lines in files and pipes."""

    console: rich.console.Console = field(default_factory=partial(Console, stderr=True, soft_wrap=True))
    clock: Callable[[], float] = time.monotonic

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` while a bar shows steps, rate and time left; the bar goes away at the end."""
        if not is_shown(logging.INFO):
            yield from items
            return
        if self.console.is_terminal:
            with Progress(*bars(), console=self.console, transient=True) as bar:
                task = bar.add_task(description, total=expected_steps(total))
                for item in items:
                    yield item
                    bar.update(task, advance=1, total=expected_steps(total))
            return
        # Bars would fill a file with copies of their line. Print lines with the time left, the first one soon.
        began = self.clock()
        next_line = began + FIRST_SECONDS
        for done, item in enumerate(items, 1):
            yield item
            now, steps = self.clock(), expected_steps(total)
            if now >= next_line and done < steps:
                next_line = now + PERIOD_SECONDS
                seconds_left = (now - began) / done * (steps - done)
                self.note(f"{description}: {done} of {steps}, about {format_seconds(seconds_left)} left")

    def note(self, message: str) -> None:
        """Print one line, unless `--quiet` was given."""
        if is_shown(logging.INFO):
            self.console.print(message, markup=False)

    def detail(self, message: str) -> None:
        """Print one line if `--verbose` was given."""
        if is_shown(logging.DEBUG):
            self.console.print(message, markup=False)
