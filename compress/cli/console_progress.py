"""Progress bars and notes on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.text import Text

Item = TypeVar("Item")


class _Rate(ProgressColumn):
    """Steps a second, once they are known."""

    def render(self, task: Task) -> Text:
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


class ConsoleProgress:
    """A `compress.progress.Progress` for a person at a terminal; files and pipes get only notes."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)

    def track(self, items: Iterable[Item], description: str, total: int) -> Iterator[Item]:
        """Yield ``items`` while a bar shows steps, rate and time left; the bar goes away at the end."""
        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(), MofNCompleteColumn(), _Rate(), TimeLeft())
        hidden = not self._console.is_terminal
        with Progress(*columns, console=self._console, transient=True, disable=hidden) as shown:
            task = shown.add_task(description, total=total)
            for item in items:
                yield item
                shown.advance(task)

    def note(self, message: str) -> None:
        """Say one line."""
        self._console.print(message, markup=False)
