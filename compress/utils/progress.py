"""Interface for progress of long work: description, completed steps, rate and remaining time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Total = int | Callable[[], int]
"""Number of steps, or a function that estimates it while the work runs (a time limit may end the work)."""


def expected_steps(total: Total) -> int:
    """Return the number of steps that is expected now."""
    return total() if callable(total) else total


class Progress(Protocol):
    """Receiver of progress of long work."""

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` while showing steps, rate and remaining time."""

    def note(self, message: str) -> None:
        """Show one line, also in the log file."""


class SilentProgress:
    """Progress that shows nothing, for `--json`, tests and library use."""

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` unchanged."""
        yield from items

    def note(self, message: str) -> None:
        """Discard the line."""
