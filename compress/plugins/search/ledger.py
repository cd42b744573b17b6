"""The ledger of a search: an append-only file of JSON lines, synchronised to disk after each trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from compress.plugins.search.outcome import TrialOutcome
from compress.utils.append_log import AppendOnlyFile
from compress.utils.errors import InputError
from compress.utils.pydantic_models import Frozen

LEDGER_FILE = "ledger.jsonl"
VERSION = 1


class PastTrial(Frozen):
    """Trial of an earlier search, or a shipped recipe, at its point in the present space.

    Attributes:
        point: Point in the present space.
        share: Share of its training.
        rooms: Margin of each limit on quality and its half-width; empty for a shipped recipe.
        source: Search or recipe that it comes from.
    """

    point: tuple[int, ...]
    share: float
    rooms: dict[str, tuple[float, float]]
    source: str


class LedgerHeader(Frozen):
    """First line of the ledger. Two searches with the same header take the same decisions."""

    version: int = VERSION
    recipe: dict[str, Any]
    knobs: tuple[tuple[str, tuple[Any, ...]], ...]
    rungs: tuple[float, ...]
    machine: dict[str, Any]
    past: tuple[PastTrial, ...] = ()
    """Past trials that the search started with, kept when it is resumed."""

    def check_same(self, now: LedgerHeader) -> None:
        """Raise `InputError` where the search differs now; a larger budget or more trials change no decision."""
        for name in ("recipe", "knobs", "rungs", "machine"):
            before_value, now_value = (to_jsonable_python(getattr(header, name)) for header in (self, now))
            if before_value == now_value:
                continue
            changed = name
            if isinstance(before_value, dict):
                fields = [
                    field for field in {**before_value, **now_value} if before_value.get(field) != now_value.get(field)
                ]
                if fields == ["search"] and _but_budget(before_value["search"]) == _but_budget(now_value["search"]):
                    continue
                changed = f"{name} ({', '.join(fields)})"
            raise InputError(
                f"The search cannot be gone on with: its {changed} is another now.",
                expected="the same as when it began, but for its budget and number of trials",
                hint="begin anew, without --resume; finished stages are kept",
            )


def _but_budget(block: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in block.items() if name not in ("budget", "trials")}


class LedgerEntry(Frozen):
    """A trial, in the order in which trials were planned.

    Attributes:
        number: Position in the ledger.
        point: Point of the recipe.
        rung: Rung that it was trained to.
        words: Difference from the recipe that the search started from.
        identity: Digest of the stages.
        why: Reason why it was tried.
        outcome: Outcome of the trial.
        elapsed: Seconds of the search so far, earlier processes included.
    """

    number: int
    point: tuple[int, ...]
    rung: int
    words: str
    identity: str
    why: str = ""
    outcome: TrialOutcome
    elapsed: float | None = None


class Ledger:
    """Ledger file in the folder of a search. Raises `StorageError` where it cannot be written; it stays valid
    then.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_FILE
        self._lines = AppendOnlyFile(self.path)

    def create(self, header: LedgerHeader) -> None:
        """Write the header of a new file."""
        self._lines.add(header.model_dump_json().encode())

    def append(self, entry: LedgerEntry) -> None:
        """Write one trial to disk."""
        self._lines.add(entry.model_dump_json().encode())

    def read(self, hint: bool = True) -> tuple[LedgerHeader, list[LedgerEntry]]:
        """Return the header and the trials. A truncated last line is ignored.

        With ``hint`` the truncated line is removed from the file, which no other process may be writing.

        Raises:
            InputError: Where the file is no ledger of this version.
        """
        if hint:
            self._lines.repair()
        lines, _ = self._lines.read()
        try:
            header = LedgerHeader.model_validate_json(lines[0])
            entries = [LedgerEntry.model_validate_json(line) for line in lines[1:]]
        except (IndexError, ValidationError) as error:
            raise InputError(
                "The search cannot be gone on with: its ledger cannot be read.",
                where=str(self.path),
                expected=f"a ledger of version {VERSION}",
                hint="begin anew, without --resume; finished stages are kept",
            ) from error
        return header, entries
