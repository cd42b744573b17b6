"""The history of a suite's nights: one SQLite file that is only ever added to.

Nights are in the order of their numbers, which the file counts itself: a clock may jump. A night is added in one
transaction, so it is there whole or not at all, and two nights that end at once both get in.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock

from compress.plugins.nightly.backups import backups_of, is_undamaged, restore, write_backup
from compress.plugins.nightly.record import EntryOutcome, Host, Kind, Night, NightFinding, Rows, Status
from compress.plugins.nightly.trend import Series, TrendPoint
from compress.results.measurement import Measurement
from compress.utils.errors import InputError, StorageError

VERSION = 1
APPLICATION = 0x434D5052
"""Application id that marks an SQLite file as a history: `CMPR`."""

# What outcomes repeat of a night is of schema 1, which was read row by row where the file was damaged.
CREATE = f"""
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
CREATE TABLE nights (
    night INTEGER PRIMARY KEY AUTOINCREMENT,
    suite TEXT NOT NULL,
    started TEXT NOT NULL CHECK (julianday(started) IS NOT NULL),
    seconds REAL NOT NULL CHECK (seconds >= 0),
    host TEXT NOT NULL,
    host_words TEXT NOT NULL,
    software TEXT NOT NULL CHECK (json_valid(software) AND json_type(software) = 'object'),
    commit_id TEXT,
    notes TEXT NOT NULL CHECK (json_valid(notes) AND json_type(notes) = 'array')
) STRICT;
CREATE TABLE outcomes (
    night INTEGER NOT NULL CHECK (night >= 1),
    suite TEXT NOT NULL,
    started TEXT NOT NULL CHECK (julianday(started) IS NOT NULL),
    host TEXT NOT NULL,
    host_words TEXT NOT NULL,
    entry TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN {get_args(Status)}),
    reason TEXT NOT NULL,
    exit_code INTEGER,
    seconds REAL NOT NULL CHECK (seconds >= 0),
    recipe_digest TEXT NOT NULL,
    report TEXT,
    log TEXT,
    noise TEXT NOT NULL,
    notes TEXT NOT NULL CHECK (json_valid(notes) AND json_type(notes) = 'array')
) STRICT;
CREATE TABLE findings (
    night INTEGER NOT NULL CHECK (night >= 1),
    entry TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN {get_args(Kind)}),
    metric TEXT,
    target TEXT,
    effect REAL,
    what TEXT NOT NULL,
    since TEXT
) STRICT;
CREATE TABLE measurements (
    night INTEGER NOT NULL CHECK (night >= 1),
    entry TEXT NOT NULL,
    model TEXT NOT NULL,
    metric TEXT NOT NULL,
    target TEXT NOT NULL,
    value REAL NOT NULL,
    unit TEXT NOT NULL,
    low REAL,
    high REAL,
    n INTEGER NOT NULL CHECK (n >= 1)
) STRICT
"""
"""Schema.

SQLite checks the constraints of every row, also in its integrity check, so that a damaged row is detected. Columns have
the names of the records' fields.
"""


_PATIENCE_SECONDS = 60.0


class NightHistory:
    """The file at ``path``, made by the first `append`.

    Its last backups lie beside it. Where the file is damaged, the newest sound one takes its place, the damaged file is
    kept beside, and ``note`` is told. Raises `InputError` for a file that is no history, has no sound backup or a newer
    schema, `StorageError` where the disk is full or another process holds the file for a minute.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self.path = path
        self._note = note

    def append(self, night: Night, rows: Rows) -> Night:
        """Add a night; the same with its number, and with a note if the clock stood before the night before.

        Raises `InputError` for a value that is not finite; nothing is added then.
        """
        for entry, measured in rows.items():
            for row in measured:
                _check_finite(entry, row)
        with self._open(create=True) as connection:
            night = night.model_copy(update={"notes": (*night.notes, *_clock_notes(connection, night))})
            host = {"host": night.host.digest, "host_words": night.host.words}
            of_night = {"suite": night.suite, "started": night.started, **host}
            values = {
                **of_night,
                "seconds": night.seconds,
                "software": json.dumps(night.software, sort_keys=True),
                "commit_id": night.commit,
                "notes": json.dumps(night.notes),
            }
            number = connection.execute(_insert("nights", values), values).lastrowid
            night = night.model_copy(update={"number": number})
            outcomes = [{**of_night, **one.model_dump(), "notes": json.dumps(one.notes)} for one in night.outcomes]
            _insert_many(connection, "outcomes", night, outcomes)
            _insert_many(connection, "findings", night, [found.model_dump() for found in night.findings])
            for entry, measured in rows.items():
                values_of = [{"entry": entry, **row.model_dump(exclude={"raw"})} for row in measured]
                _insert_many(connection, "measurements", night, values_of)
            connection.execute("COMMIT")
            self._back_up(connection)
        return night

    def read_nights(self, suite: str) -> tuple[Night, ...]:
        """The nights of that suite in their order, with outcomes and findings; none of a file that is not there."""
        with self._open() as connection:
            if connection is None:
                return ()
            outcomes = _grouped(connection, "outcomes", EntryOutcome.model_fields)
            findings = _grouped(connection, "findings", NightFinding.model_fields)
            query = "SELECT * FROM nights WHERE suite = ? ORDER BY night"
            return tuple(_night(dict(row), outcomes, findings) for row in connection.execute(query, (suite,)))

    def series(self, suite: str) -> tuple[Series, ...]:
        """Every measured quantity of that suite as a series of nights, each host apart, in the order of the rows."""
        query = """
            SELECT measurements.entry, model, metric, target, nights.host, nights.host_words,
                nights.night, nights.started, value, low, high, coalesce(noise, '') != 'unusable', unit
            FROM measurements JOIN nights ON measurements.night = nights.night
            LEFT JOIN outcomes ON outcomes.night = nights.night AND outcomes.entry = measurements.entry
            WHERE nights.suite = ? ORDER BY measurements.night, measurements.rowid
        """
        found: dict[tuple[Any, ...], list[TrendPoint]] = {}
        units: dict[tuple[Any, ...], str] = {}
        with self._open() as connection:
            for row in connection.execute(query, (suite,)) if connection else ():
                point = TrendPoint(row[6], row[7], row[8], row[9], row[10], bool(row[11]))
                found.setdefault(row[:6], []).append(point)
                units[row[:6]] = row[12]
        return tuple(
            Series(key[0], key[1], key[2], key[3], units[key], Host(digest=key[4], words=key[5]), tuple(points))
            for key, points in found.items()
        )

    @contextmanager
    def _open(self, create: bool = False) -> Iterator[Any]:
        """A connection within a transaction, or None where there is no file and none is to be made."""
        if not create and not self.path.exists():
            yield None
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite's own lock guards the transaction; this one guards files beside it.
            with FileLock(f"{self.path}.lock", timeout=_PATIENCE_SECONDS):
                self._repair()
                with closing(connect(self.path)) as connection:
                    connection.execute("BEGIN IMMEDIATE")
                    self._prepare(connection)
                    yield connection
                    if connection.in_transaction:
                        connection.execute("COMMIT")
        except (OSError, TimeoutError, sqlite3.OperationalError) as error:
            raise StorageError(
                f"The history cannot be used: {error}",
                where=str(self.path),
                expected="a file that this user may write, on a disk with room for it",
                hint="free some space or name another file under `history:` in the suite",
            ) from error

    def _repair(self) -> None:
        if self.path.is_dir():
            raise InputError("A folder lies where the history should be.", where=str(self.path), expected="a file")
        # An empty file is a history to be, unless it once was one.
        whole = not self.path.exists() or (self.path.stat().st_size == 0 and not backups_of(self.path))
        if not whole and not is_undamaged(self.path):
            restore(self.path, self._note)

    def _back_up(self, connection: sqlite3.Connection) -> None:
        """Raises nothing: the night is in the history, whether there is room for its backup or not."""
        try:
            write_backup(connection, self.path)
        except (OSError, sqlite3.OperationalError) as error:
            self._note(f"No backup of the history {self.path} could be written: {error}. The night itself is in it.")

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """Make the tables of a new file. Raises `InputError` for a file that is not ours or not of our time."""
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (count,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if count == 0:
            for statement in CREATE.split(";"):
                connection.execute(statement)
        elif application != APPLICATION:
            raise InputError(
                "This SQLite file is no history of nights.",
                where=str(self.path),
                expected="a file that `compress nightly` made, or none",
                hint="name another file under `history:` in the suite",
            )
        elif version != VERSION:
            raise InputError(
                f"The history has schema {version}; this compress reads schema {VERSION}.",
                where=str(self.path),
                expected=f"a history of schema {VERSION}",
                hint="pip install --upgrade compress, or name another file under `history:` in the suite",
            )


def connect(path: Path) -> sqlite3.Connection:
    """A connection that begins and ends transactions only when told to."""
    connection = sqlite3.connect(path, timeout=_PATIENCE_SECONDS, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


def _check_finite(entry: str, row: Measurement) -> None:
    wrong = [name for name in ("value", "low", "high") if not math.isfinite(getattr(row, name) or 0.0)]
    if wrong:
        raise InputError(
            f"A {wrong[0]} that is no finite number cannot go into the history: {getattr(row, wrong[0])}.",
            where=f"{entry}: {row.metric} of {row.model} on {row.target}",
            expected="a finite number",
            hint="find out why the measurement gave none; nothing of this night was added",
        )


def _clock_notes(connection: sqlite3.Connection, night: Night) -> tuple[str, ...]:
    query = "SELECT started FROM nights WHERE suite = ? ORDER BY night DESC LIMIT 1"
    row = connection.execute(query, (night.suite,)).fetchone()
    if row is None or datetime.fromisoformat(row[0]) <= datetime.fromisoformat(night.started):
        return ()
    return (f"The clock says {night.started}, which is before the night before ({row[0]}); nights keep their order.",)


def _insert(table: str, values: Mapping[str, Any]) -> str:
    return f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join(f':{name}' for name in values)})"


def _insert_many(connection: sqlite3.Connection, table: str, night: Night, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows of a night, all with the same columns."""
    if rows:
        numbered = [{"night": night.number, **row} for row in rows]
        connection.executemany(_insert(table, numbered[0]), numbered)


def _grouped(connection: sqlite3.Connection, table: str, fields: Iterable[str]) -> dict[int, list[dict[str, Any]]]:
    """Night -> these fields of its rows."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in connection.execute(f"SELECT night AS of_night, {', '.join(fields)} FROM {table} ORDER BY rowid"):
        (_, number), *values = dict(row).items()
        found.setdefault(number, []).append(dict(values))
    return found


def _night(
    row: dict[str, Any], outcomes: dict[int, list[dict[str, Any]]], findings: dict[int, list[dict[str, Any]]]
) -> Night:
    number = row["night"]
    return Night(
        suite=row["suite"],
        started=row["started"],
        seconds=row["seconds"],
        host=Host(digest=row["host"], words=row["host_words"]),
        software=json.loads(row["software"]),
        commit=row["commit_id"],
        number=number,
        outcomes=tuple(
            EntryOutcome.model_validate({**fields, "notes": tuple(map(str, json.loads(fields["notes"])))})
            for fields in outcomes.get(number, ())
        ),
        findings=tuple(NightFinding.model_validate(fields) for fields in findings.get(number, ())),
        notes=tuple(map(str, json.loads(row["notes"]))),
    )
