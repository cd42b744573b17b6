"""Live display of a search: a table with progress bars below it, or plain lines without a terminal."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

from rich.console import Console, ConsoleRenderable, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.progress import Progress
from rich.segment import ControlType

from compress.cli.console_progress import ConsoleProgress, bars
from compress.plugins.search.console import LiveTable
from compress.plugins.search.progress import SearchSnapshot
from compress.utils.progress import Total, expected_steps

Item = TypeVar("Item")
_PERIOD_SECONDS = 0.5
"""Interval at which the table is drawn, for its clocks."""


class SearchConsole:
    """Progress and display of a search. Notes scroll above the table, which stays in place after Ctrl-C."""

    def __init__(self, console: Console | None = None, lines: bool = False) -> None:
        """Open the display; with ``lines`` there is no table."""
        self._console = console or Console(stderr=True, highlight=False)
        self._draws = self._console.is_terminal and not lines
        # Lines of a table are wrapped, and those of a file are not.
        self._lines = ConsoleProgress(self._console if self._draws else console)
        self._bars = Progress(*bars(), console=self._console)
        self._live: _Drawn | None = None
        self._table: RenderableType = ""
        # One draws at a time: the cursor goes back over what was drawn last.
        self._lock, self._over = threading.RLock(), threading.Event()
        self._ticking: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def show(self, seen: SearchSnapshot) -> None:
        """Draw the table."""
        if not self._draws:
            return
        self._table = LiveTable(seen)
        with self._lock:
            if self._live is None:
                self._live = _Drawn(self._console, self)
                self._live.start()
                self._over.clear()
                self._ticking = threading.Thread(target=self._tick, daemon=True)
                self._ticking.start()
            self._live.refresh()

    def _tick(self) -> None:
        while not self._over.wait(_PERIOD_SECONDS):
            with self._lock:
                if self._live is not None:
                    self._live.refresh()

    def stop(self) -> None:
        """Stop drawing."""
        self._over.set()
        if self._ticking is not None:
            self._ticking.join()
            self._ticking = None
        with self._lock:
            if self._live is not None:
                self._live.stop()
                self._live = None

    def note(self, message: str) -> None:
        """Print one line."""
        with self._lock:
            self._lines.note(message)

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` and show their progress as a bar below the table."""
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
        super().__init__(console=console, get_renderable=lambda: shown, auto_refresh=False, vertical_overflow="crop")
        self._drawn: list[int] = []

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Return the output: cursor movement over the last table, then ``renderables``, then the table."""
        options = self.console.options
        wrapped = sum(max(math.ceil(cells / options.max_width), 1) - 1 for cells in self._drawn)
        back = Control(*[(ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)] * wrapped)
        lines = self.console.render_lines(self.get_renderable(), options, pad=False)
        self._drawn = [sum(segment.cell_length for segment in line) for line in lines[: options.size.height]]
        return [back, *super().process_renderables(renderables)]
