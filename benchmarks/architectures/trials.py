"""Run trials of a model in separate processes, and build the table of their results."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from compress.utils.errors import CompressError, first_line

if TYPE_CHECKING:
    from compress.stages.base import Context

SILENT = cast("Context", SimpleNamespace(note=lambda _: None))
"""Context of stages that only write notes, which are dropped."""
REASON = "reason"
_LIMIT_SECONDS = 300
_NO, _UNFUSED = "no", "as it is"


@dataclass(frozen=True)
class Trial:
    """Columns of the table and the function that computes their cells for a model, which may be `no: reason`.

    If the function raises an error, ends the process or takes more than five minutes, all cells are `no: reason`.
    """

    columns: tuple[str, ...]
    judge: Callable[[str, Path], Mapping[str, str]]


@dataclass(frozen=True)
class Group:
    """Models with the same trials."""

    title: str
    names: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def columns(self) -> list[str]:
        """The model's name, the columns of the trials, and the reasons of failures."""
        return ["model", *(column for trial in self.trials for column in trial.columns), REASON]

    def row(self, name: str) -> list[str]:
        """Run the trials of a model and return its row, with all reasons in the last cell."""
        cells: dict[str, str] = {}
        for trial in self.trials:
            cells |= dict(run_in_process(trial, name))
        reasons: dict[str, list[str]] = {}
        for column, cell in cells.items():
            cells[column], _, reason = cell.partition(": ")
            if reason:
                reasons.setdefault(reason, []).append(column)
        reason_cell = "; ".join(f"{', '.join(columns)}: {reason}" for reason, columns in reasons.items())
        return [name, *(cells.get(column, "") for column in self.columns[1:-1]), reason_cell]

    def worse(self, stored: Sequence[str], current: Sequence[str]) -> list[str]:
        """Return the columns in which the current row is worse than the stored one."""
        cells = zip(self.columns, stored, current, strict=True)
        return [column for column, old, new in cells if column != REASON and _rank(new) < _rank(old)]

    def summary(self, rows: Sequence[Sequence[str]]) -> str:
        """Return how many models succeed in each column."""
        columns = enumerate(self.columns[1:-1], start=1)
        counts = (f"{column} {sum(_rank(row[index]) > 1 for row in rows)}" for index, column in columns)
        return f"Successes of {len(rows)} models: {', '.join(counts)}."


def _rank(cell: str) -> int:
    return 0 if cell.startswith(_NO) else 1 if cell.startswith(_UNFUSED) else 2


def run_in_process(trial: Trial, name: str) -> Mapping[str, str]:
    """Run a trial in a child process, so that a crash or a timeout there does not affect this process."""
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_child, args=(trial, name, Path(folder), sender))
        process.start()
        sender.close()
        try:
            cells = receiver.recv() if receiver.poll(_LIMIT_SECONDS) else f"took more than {_LIMIT_SECONDS} s"
        except EOFError:
            error_lines = (Path(folder) / "stderr.txt").read_text(errors="replace").strip().splitlines()
            cells = next(
                (line for line in reversed(error_lines) if "ASSERT" in line or "Error" in line), "the process ended"
            )
        process.kill()
        process.join()
    return cells if isinstance(cells, Mapping) else dict.fromkeys(trial.columns, f"{_NO}: {cells}")


def _child(trial: Trial, name: str, folder: Path, connection: Connection) -> None:
    with (folder / "stderr.txt").open("w") as log:
        os.dup2(log.fileno(), 2)
        try:
            connection.send(trial.judge(name, folder))
        except CompressError as error:
            connection.send(" ".join(error.what.split()))
        except Exception as error:  # noqa: BLE001 - the row shows any error
            connection.send(f"TRACEBACK {type(error).__name__}: {first_line(error)}")
