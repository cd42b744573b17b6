"""The truth of a search: a file of JSON lines that is only ever added to, each line on the disk before it counts."""

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
    """Where in this space something earlier lies, and how far inside each limit on quality, with its half-width.

    ``share`` is that of its training. A recipe that is only known to be shipped has no ``rooms``.
    """

    point: tuple[int, ...]
    share: float
    rooms: dict[str, tuple[float, float]]
    source: str


class LedgerHeader(Frozen):
    """What a search is of: the first line. Two searches of the same header take the same decisions."""

    version: int = VERSION
    recipe: dict[str, Any]
    knobs: tuple[tuple[str, tuple[Any, ...]], ...]
    rungs: tuple[float, ...]
    machine: dict[str, Any]
    past: tuple[PastTrial, ...] = ()
    """What it began with, which a search that is gone on with keeps."""

    def check_same(self, now: LedgerHeader) -> None:
        """Raise `InputError` where a search is another now; more time, or more trials, changes nothing decided."""
        for name in ("recipe", "knobs", "rungs", "machine"):
            one, other = (to_jsonable_python(getattr(each, name)) for each in (self, now))
            if one == other:
                continue
            changed = name
            if isinstance(one, dict):
                fields = [field for field in {**one, **other} if one.get(field) != other.get(field)]
                if fields == ["search"] and _but_budget(one["search"]) == _but_budget(other["search"]):
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
    """One trial, in the order in which it was decided on; ``words`` is what differs from the recipe as it stands.

    ``why`` says why it was tried, ``elapsed`` how many seconds the search had taken by then, in all of its processes.
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
    """The file in a search's folder. Raises `StorageError` where it cannot be written, and is whole then too."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_FILE
        self._lines = AppendOnlyFile(self.path)

    def create(self, header: LedgerHeader) -> None:
        """Write the first line, of a file that isn't there yet."""
        self._lines.add(header.model_dump_json().encode())

    def append(self, entry: LedgerEntry) -> None:
        """Write one trial; it counts once this returns."""
        self._lines.add(entry.model_dump_json().encode())

    def read(self, hint: bool = True) -> tuple[LedgerHeader, list[LedgerEntry]]:
        """The header and the trials so far. A last line that a kill or a full disk cut short doesn't count.

        With ``hint`` it is taken off the file, which nobody else may be writing then.

        Raises `InputError` for a file that is none of this version.
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
