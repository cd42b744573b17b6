"""Progress on standard error: what runs, how far it is, how fast it goes, how long it still takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Total = int | Callable[[], int]
"""How many steps there are, or, where a clock ends them, what says after each how many it will have been."""


def steps_of(total: Total) -> int:
    """As many as are expected by now."""
    return total() if callable(total) else total


class Progress(Protocol):
    """Where long work says how far it has come."""

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` while showing steps, rate and time left."""

    def note(self, message: str) -> None:
        """Say one line, also into the log file."""


class SilentProgress:
    """Shows nothing: for `--json`, tests and library use."""

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` unchanged."""
        yield from items

    def note(self, message: str) -> None:
        """Drop the line."""
