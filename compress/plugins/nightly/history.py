"""History of a suite's nights: one SQLite file to which nights are only ever added, and its backups.

The file itself numbers the nights, because a clock may jump. A night is added in one transaction. So it is either
complete or absent, and two nights that end at the same time are both added.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock

from compress.plugins.nightly.record import EntryOutcome, Host, Kind, Night, NightFinding, Rows, Status
from compress.plugins.nightly.trend import Series, TrendPoint
from compress.utils.errors import InputError, StorageError, first_line

BACKUP_COUNT = 3
_MAGIC = b"SQLite format 3\0"


def backups_of(path: Path) -> list[Path]:
    """Return the existing backups of the history at ``path``, the newest first."""
    paths = (path.with_name(f"{path.name}.backup-{age}") for age in range(1, BACKUP_COUNT + 1))
    return [backup for backup in paths if backup.exists()]


def write_backup(connection: sqlite3.Connection, path: Path) -> None:
    """Write the history as its newest backup and remove the oldest one.

    Raises `OSError` or `sqlite3.OperationalError` if there is no room for it. Every earlier backup still exists then.
    """
    # Write a new file and rename it at the end, so that a killed process leaves every backup intact.
    new = path.with_name(f"{path.name}.backup-new")
    new.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(new)) as copy:
            # A journal on disk would survive a killed process, and SQLite would apply it to the next copy.
            copy.execute("PRAGMA journal_mode = MEMORY")
            connection.backup(copy)
        with new.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, sqlite3.OperationalError):
        new.unlink(missing_ok=True)
        raise
    # Rename from the oldest to the newest, so that no backup overwrites one that is still needed.
    for age in range(BACKUP_COUNT - 1, 0, -1):
        backup = path.with_name(f"{path.name}.backup-{age}")
        if backup.exists():
            backup.replace(path.with_name(f"{path.name}.backup-{age + 1}"))
    new.replace(path.with_name(f"{path.name}.backup-1"))


def is_undamaged(path: Path) -> bool:
    """Return whether SQLite finds no damage in the file and every row satisfies the constraints of its table.

    SQLite first rolls back a night during which a process was killed, for which it has to write.
    """
    with path.open("rb") as file:
        # SQLite would treat an empty or foreign file as a new database.
        if file.read(len(_MAGIC)) != _MAGIC:
            return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as connection:
            return bool(connection.execute("PRAGMA integrity_check(1)").fetchone() == ("ok",))
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            return False
        raise
    except (sqlite3.DatabaseError, UnicodeDecodeError):
        return False


def restore(path: Path, note: Callable[[str], None]) -> None:
    """Replace a damaged history by its newest undamaged backup, rename the damaged file and call ``note``.

    Raises `InputError`, and leaves the file as it is, if there is no such backup.
    """
    backups = backups_of(path)
    backup = next((candidate for candidate in backups if is_undamaged(candidate)), None)
    if backup is None:
        raise InputError(
            "This file is no history, or it is damaged and no backup of it can be read.",
            where=str(path),
            expected=f"a file of `compress nightly`, or none; its backups are {path.name}.backup-1 to -{BACKUP_COUNT}",
            hint="move it away to begin a new history, or name another file under `history:` in the suite",
        )
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    names = (f"{path.name}.damaged-{stamp}" + (f"-{attempt}" if attempt else "") for attempt in range(1000))
    # Names end with a number if several files were damaged in one second.
    damaged = next(free for name in names if not (free := path.with_name(name)).exists())
    fresh = path.with_name(f"{path.name}.backup-new")
    # Copy first and rename last: the original is replaced only once both copies are complete.
    try:
        shutil.copy2(path, damaged)
        shutil.copyfile(backup, fresh)
    except OSError:
        damaged.unlink(missing_ok=True)
        fresh.unlink(missing_ok=True)
        raise
    # SQLite must not apply the journal of the damaged file to the restored one.
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    fresh.replace(path)
    with closing(sqlite3.connect(backup)) as connection:
        row = connection.execute("SELECT night, started FROM nights ORDER BY night DESC LIMIT 1").fetchone()
    last = f"night {row[0]} of {row[1][:10]}" if row else "no night"
    unreadable = ", ".join(damaged_backup.name for damaged_backup in backups[: backups.index(backup)])
    also = f" ({unreadable} cannot be read either)" if unreadable else ""
    note(
        f"The history {path} was damaged and was saved as {damaged.name}. It goes on from {backup.name}{also}, "
        f"which ends with {last}: what a later night had measured is lost from the history."
    )


VERSION = 1
APPLICATION = 0x434D5052
"""Application id that marks an SQLite file as a history: `CMPR`."""

# Outcomes repeat columns of their night. Schema 1 has them so that single rows of a damaged file remain readable.
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


_Row = dict[str, Any]
_LOCK_TIMEOUT_SECONDS = 60.0


class NightHistory:
    """SQLite file at ``path``, created by the first `append`, with its backups beside it.

    A damaged file is replaced by the newest undamaged backup. The damaged file is renamed and ``note`` is called.
    Methods raise `InputError` for a file that is not a history, has no undamaged backup or a newer schema, and
    `StorageError` if the disk is full or another process locks the file for a minute.
    """

    def __init__(self, path: Path, note: Callable[[str], None]) -> None:
        self.path = path
        self._note = note

    def append(self, night: Night, rows: Rows) -> Night:
        """Add a night. Return it with its number, and with a note if the clock went back since the previous night."""
        with self._open(create=True) as connection:
            assert connection is not None, "a new history is created"
            # A clock that went back is reported, and the order of numbers is kept.
            query = "SELECT started FROM nights WHERE suite = ? ORDER BY night DESC LIMIT 1"
            last = connection.execute(query, (night.suite,)).fetchone()
            if last and datetime.fromisoformat(last[0]) > datetime.fromisoformat(night.started):
                note = f"The clock says {night.started}, which is before the night before ({last[0]}); nights keep "
                night = night.model_copy(update={"notes": (*night.notes, f"{note}their order.")})
            host = {"host": night.host.digest, "host_words": night.host.words}
            of_night = {"suite": night.suite, "started": night.started, **host}
            software, notes = json.dumps(night.software, sort_keys=True), json.dumps(night.notes)
            values = {**of_night, "seconds": night.seconds, "software": software, "commit_id": night.commit}
            values["notes"] = notes
            # SQLite assigns the number, so that two nights that end together get different ones.
            number = connection.execute(_insert("nights", values), values).lastrowid
            night = night.model_copy(update={"number": number})
            outcomes = [
                {**of_night, **outcome.model_dump(), "notes": json.dumps(outcome.notes)} for outcome in night.outcomes
            ]
            _insert_many(connection, "outcomes", night, outcomes)
            _insert_many(connection, "findings", night, [finding.model_dump() for finding in night.findings])
            for entry, measured in rows.items():
                values_of = [{"entry": entry, **row.model_dump(exclude={"raw"})} for row in measured]
                _insert_many(connection, "measurements", night, values_of)
            connection.execute("COMMIT")
            # Back up after the commit, so that a backup contains complete nights only. An error is noted only, because
            # the night itself is in the history.
            try:
                write_backup(connection, self.path)
            except (OSError, sqlite3.OperationalError) as error:
                self._note(
                    f"No backup of the history {self.path} could be written: {error}. The night itself is in it."
                )
        return night

    def read(self, suite: str) -> tuple[Night, ...]:
        """Return the nights of a suite in their order, with outcomes and findings; empty if the file does not exist."""
        with self._open() as connection:
            if connection is None:
                return ()
            outcomes = _grouped(connection, "outcomes", EntryOutcome.model_fields)
            findings = _grouped(connection, "findings", NightFinding.model_fields)
            rows = connection.execute("SELECT * FROM nights WHERE suite = ? ORDER BY night", (suite,)).fetchall()
        try:
            return self._nights(rows, outcomes, findings)
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise InputError(
                f"The history has a night that cannot be read: {first_line(error)}",
                where=str(self.path),
                expected="values as `compress nightly` writes them",
                hint=f"put a backup in its place ({self.path.name}.backup-1), or name another file in the suite",
            ) from error

    @staticmethod
    def _nights(
        rows: Sequence[sqlite3.Row], outcomes: Mapping[int, list[_Row]], findings: Mapping[int, list[_Row]]
    ) -> tuple[Night, ...]:
        return tuple(
            Night(
                suite=row["suite"],
                started=row["started"],
                seconds=row["seconds"],
                host=Host(digest=row["host"], words=row["host_words"]),
                software=json.loads(row["software"]),
                commit=row["commit_id"],
                number=row["night"],
                outcomes=tuple(
                    EntryOutcome.model_validate({**fields, "notes": json.loads(fields["notes"])})
                    for fields in outcomes.get(row["night"], ())
                ),
                findings=tuple(NightFinding.model_validate(fields) for fields in findings.get(row["night"], ())),
                notes=json.loads(row["notes"]),
            )
            for row in rows
        )

    def series(self, suite: str) -> tuple[Series, ...]:
        """Return the series of every metric of a suite and every host, in the order of the rows."""
        # A night without a verdict on noise counts as quiet.
        query = """
            SELECT measurements.entry, model, metric, target, nights.host, nights.host_words,
                nights.night, nights.started, value, low, high, coalesce(noise, '') != 'unusable', unit
            FROM measurements JOIN nights ON measurements.night = nights.night
            LEFT JOIN outcomes ON outcomes.night = nights.night AND outcomes.entry = measurements.entry
            WHERE nights.suite = ? ORDER BY measurements.night, measurements.rowid
        """
        points: dict[tuple[str, ...], list[TrendPoint]] = {}
        units: dict[tuple[str, ...], str] = {}
        with self._open() as connection:
            for row in connection.execute(query, (suite,)) if connection else ():
                # The first six columns identify the series, the last one is its unit.
                points.setdefault(row[:6], []).append(TrendPoint._make((*row[6:11], bool(row[11]))))
                units[row[:6]] = row[12]
        return tuple(
            Series(entry, model, metric, target, units[key], Host(digest=digest, words=words), tuple(points[key]))
            for key in points
            for entry, model, metric, target, digest, words in [key]
        )

    @contextmanager
    def _open(self, create: bool = False) -> Iterator[sqlite3.Connection | None]:
        """Open a connection within a transaction, or yield None if there is no file and ``create`` is false."""
        if not create and not self.path.exists():
            yield None
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # SQLite's own lock guards the transaction. This lock also guards the backups and the damaged file.
            with FileLock(f"{self.path}.lock", timeout=_LOCK_TIMEOUT_SECONDS):
                if self.path.is_dir():
                    raise InputError(
                        "A folder lies where the history should be.", where=str(self.path), expected="a file"
                    )
                # An empty file is a new history, unless backups show that it once had content.
                is_new = not self.path.exists() or (self.path.stat().st_size == 0 and not backups_of(self.path))
                if not is_new and not is_undamaged(self.path):
                    restore(self.path, self._note)
                with closing(connect(self.path)) as connection:
                    # Take the write lock now. Upgrading a read lock later could fail.
                    connection.execute("BEGIN IMMEDIATE")
                    # Create the tables of a new file. Raises `InputError` for another application's file or another
                    # schema.
                    (application,) = connection.execute("PRAGMA application_id").fetchone()
                    (version,) = connection.execute("PRAGMA user_version").fetchone()
                    # A file without tables is new.
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


def connect(path: Path) -> sqlite3.Connection:
    """Return a connection that begins and ends transactions only by explicit statements."""
    connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT_SECONDS, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


def _insert(table: str, values: Mapping[str, object]) -> str:
    return f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join(f':{name}' for name in values)})"


def _insert_many(
    connection: sqlite3.Connection, table: str, night: Night, rows: Sequence[Mapping[str, object]]
) -> None:
    """Add rows of a night that all have the same columns."""
    if rows:
        numbered = [{"night": night.number, **row} for row in rows]
        connection.executemany(_insert(table, numbered[0]), numbered)


def _grouped(connection: sqlite3.Connection, table: str, fields: Iterable[str]) -> dict[int, list[_Row]]:
    """Return the given fields of a table's rows by night."""
    rows: dict[int, list[_Row]] = {}
    for row in connection.execute(f"SELECT night AS of_night, {', '.join(fields)} FROM {table} ORDER BY rowid"):
        (_, number), *values = dict(row).items()
        rows.setdefault(number, []).append(dict(values))
    return rows
