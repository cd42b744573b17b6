"""State of a running search for a display."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from compress.plugins.search.acquisition import Expectation
from compress.plugins.search.record import SearchRecord


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


class ProgressDisplay(Protocol):
    """Display of a running search."""

    def show(self, seen: SearchSnapshot) -> None:
        """Show a snapshot until the next one."""

    def stop(self) -> None:
        """Leave the last snapshot in place; later output comes below it."""


class NoDisplay:
    """Display that shows nothing."""

    def show(self, seen: SearchSnapshot) -> None:
        """Ignore the snapshot."""

    def stop(self) -> None:
        """Do nothing."""
