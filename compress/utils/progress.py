"""Interface for progress of long work: description, completed steps, rate, remaining time, notes and details.

The level of the logger `compress` sets how much the console shows: WARNING only errors and results (`--quiet`), INFO
also bars and notes, DEBUG also details (`--verbose`). The log of a run has all notes and details in every case.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

Item = TypeVar("Item")
LOGGER = logging.getLogger("compress")
Total = int | Callable[[], int]
"""Number of steps, or a function that estimates it while the work runs (a time limit may end the work)."""


def set_verbosity(quiet: bool, verbose: bool) -> None:
    """Set what the console shows: only errors and results, also bars and notes, or also details."""
    LOGGER.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)


def is_shown(level: int) -> bool:
    """Return whether the console shows messages of a level of `logging`."""
    return (LOGGER.level or logging.INFO) <= level


def expected_steps(total: Total) -> int:
    """Return the number of steps that is expected now."""
    return total() if callable(total) else total


class Progress(Protocol):
    """Receiver of progress of long work."""

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` while showing steps, rate and remaining time."""

    def note(self, message: str) -> None:
        """Show one line, also in the log file."""

    def detail(self, message: str) -> None:
        """Write one line, such as one for each layer, to the log file, and show it with `--verbose`."""


@dataclass(frozen=True)
class NotesAsDetails:
    """Progress of work that the user did not ask for: its notes are details. Steps are shown."""

    inner: Progress

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` through the inner progress."""
        yield from self.inner.track(items, description, total)

    def note(self, message: str) -> None:
        """Pass the line on as a detail."""
        self.inner.detail(message)

    def detail(self, message: str) -> None:
        """Pass the line on."""
        self.inner.detail(message)


class SilentProgress:
    """Progress that shows nothing, for `--json`, tests and library use. The logger `compress` receives the lines."""

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` unchanged."""
        yield from items

    def note(self, message: str) -> None:
        """Pass the line to the logger."""
        LOGGER.info(message)

    def detail(self, message: str) -> None:
        """Pass the line to the logger."""
        LOGGER.debug(message)
