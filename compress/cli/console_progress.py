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
"""Where nobody watches a bar, a line is said this often."""


class _Rate(ProgressColumn):
    """Steps a second, once they are known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def bars() -> tuple[ProgressColumn, ...]:
    """What a bar has beside it: the work, steps, rate and time left."""
    text = TextColumn("{task.description}", markup=False)
    return text, BarColumn(), MofNCompleteColumn(), _Rate(), TimeLeft()


class ConsoleProgress:
    """A `compress.utils.progress.Progress`: bars for a person at a terminal, now and then a line for files and pipes."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._clock = clock

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` while a bar shows steps, rate and time left; the bar goes away at the end."""
        if not self._console.is_terminal:
            yield from self._told(items, description, total)
            return
        with Progress(*bars(), console=self._console, transient=True) as shown:
            task = shown.add_task(description, total=expected_steps(total))
            for item in items:
                yield item
                shown.update(task, advance=1, total=expected_steps(total))

    def _told(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        began = said = self._clock()
        for done, item in enumerate(items, 1):
            yield item
            now, steps = self._clock(), expected_steps(total)
            if now - said >= PERIOD_SECONDS and done < steps:
                said = now
                left = (now - began) / done * (steps - done)
                self.note(f"{description}: {done} of {steps}, about {format_seconds(left)} left")

    def note(self, message: str) -> None:
        """Say one line."""
        self._console.print(message, markup=False)
