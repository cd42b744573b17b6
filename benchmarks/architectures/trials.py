"""Trials of a model, each in a process of its own, and the table of what came of them."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from compress.utils.errors import CompressError, first_line

WHY = "reason"
_LIMIT_SECONDS = 300
_NO, _PLAIN = "no", "as it is"


@dataclass(frozen=True)
class Trial:
    """What a model is tried for: ``judge(name, folder)`` gives a cell for each column, or `no: reason`.

    Cells of errors, of ends of the process and of more than five minutes are `no: reason` in every column.
    """

    columns: tuple[str, ...]
    judge: Callable[[str, Path], Mapping[str, str]]


@dataclass(frozen=True)
class Group:
    """Models that are tried for the same."""

    title: str
    names: tuple[str, ...]
    trials: tuple[Trial, ...]

    @property
    def columns(self) -> list[str]:
        """The model's name, what the trials tell, and the reasons of what is not so."""
        return ["model", *(column for trial in self.trials for column in trial.columns), WHY]

    def row(self, name: str) -> list[str]:
        """The cells of a model. Reasons stand in the last one, each once."""
        cells: dict[str, str] = {}
        for trial in self.trials:
            cells |= dict(in_a_process(trial, name))
        reasons: dict[str, list[str]] = {}
        for column, cell in cells.items():
            cells[column], _, reason = cell.partition(": ")
            if reason:
                reasons.setdefault(reason, []).append(column)
        why = "; ".join(f"{', '.join(columns)}: {reason}" for reason, columns in reasons.items())
        return [name, *(cells.get(column, "") for column in self.columns[1:-1]), why]

    def worse(self, before: Sequence[str], now: Sequence[str]) -> list[str]:
        """The columns in which a row is worse than it was."""
        pairs = zip(self.columns, before, now, strict=True)
        return [column for column, old, new in pairs if column != WHY and _rank(new) < _rank(old)]

    def summary(self, rows: Sequence[Sequence[str]]) -> str:
        """How many models each column holds for."""
        counts = (f"{column} {sum(_rank(row[index]) > 1 for row in rows)}" for index, column in self._judged())
        return f"Of {len(rows)}: {', '.join(counts)}."

    def _judged(self) -> list[tuple[int, str]]:
        return [(index, column) for index, column in enumerate(self.columns) if 0 < index < len(self.columns) - 1]


def _rank(cell: str) -> int:
    return 0 if cell.startswith(_NO) else 1 if cell.startswith(_PLAIN) else 2


def in_a_process(trial: Trial, name: str) -> Mapping[str, str]:
    """What the trial says of a model, where nothing that ends the process, or takes too long, ends this one."""
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = multiprocessing.Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(target=_answer, args=(trial, name, Path(folder), sender))
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


def _answer(trial: Trial, name: str, folder: Path, connection: Connection) -> None:
    with (folder / "stderr.txt").open("w") as log:
        os.dup2(log.fileno(), 2)
        try:
            connection.send(trial.judge(name, folder))
        except CompressError as error:
            connection.send(" ".join(error.what.split()))
        except Exception as error:  # noqa: BLE001 - whatever a row ends in is what it shows
            connection.send(f"TRACEBACK {type(error).__name__}: {first_line(error)}")
