"""What a search tells whoever watches it: everything so far, what is being tried and why, how much time is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from compress.plugins.search.acquisition import Expectation
from compress.plugins.search.record import SearchRecord


@dataclass(frozen=True)
class RunningTrial:
    """A trial that runs now; ``since`` is a time of `time.monotonic`."""

    number: int
    words: str
    share: float
    why: str
    expected: Expectation | None
    since: float


@dataclass(frozen=True)
class SearchSnapshot:
    """A moment of a search. ``left`` are the seconds for trials at ``moment``, a time of `time.monotonic`.

    ``doing`` says what runs where that is no trial: the session at the end.
    """

    record: SearchRecord
    trying: tuple[RunningTrial, ...]
    left: float
    moment: float
    doing: str = ""


class ProgressDisplay(Protocol):
    """Who watches a search."""

    def show(self, seen: SearchSnapshot) -> None:
        """Show a moment, which lasts until the next."""

    def stop(self) -> None:
        """Leave what is shown as it is; what is said afterwards comes below it."""


class NoDisplay:
    """A watcher where nobody watches."""

    def show(self, seen: SearchSnapshot) -> None:
        """Show nothing."""

    def stop(self) -> None:
        """Nothing is shown."""
