"""What a search tells whoever watches it: everything so far, what is being tried and why, how much time is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from compress.plugins.search.acquisition import Expected
from compress.plugins.search.record import SearchRecord


@dataclass(frozen=True)
class Trying:
    """A trial that runs now; ``since`` is a time of `time.monotonic`."""

    number: int
    words: str
    share: float
    why: str
    expected: Expected | None
    since: float


@dataclass(frozen=True)
class Seen:
    """A moment of a search. ``left`` are the seconds for trials at ``moment``, a time of `time.monotonic`.

    ``doing`` says what runs where that is no trial: the session at the end.
    """

    record: SearchRecord
    trying: tuple[Trying, ...]
    left: float
    moment: float
    doing: str = ""


class Watcher(Protocol):
    """Who watches a search."""

    def see(self, seen: Seen) -> None:
        """Show a moment, which lasts until the next."""

    def leave(self) -> None:
        """Leave what is shown as it is; what is said afterwards comes below it."""


class Nobody:
    """A watcher where nobody watches."""

    def see(self, seen: Seen) -> None:
        """Show nothing."""

    def leave(self) -> None:
        """Nothing is shown."""
