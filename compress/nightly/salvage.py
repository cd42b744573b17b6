"""Saving what can still be read of a damaged history."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from compress.errors import InputError
from compress.nightly.pages import Row, stored_rows
from compress.nightly.tables import COLUMNS, CREATE

_MADE_AGAIN = """
    INSERT INTO nights (night, suite, started, seconds, host, host_words, software, commit_id, notes)
    SELECT night, suite, started, sum(seconds), host, host_words, '{}', NULL, '["made again from its outcomes"]'
    FROM outcomes WHERE night NOT IN (SELECT night FROM nights) GROUP BY night
"""
_MAGIC = b"SQLite format 3\0"


def is_sound(path: Path) -> bool:
    """Whether SQLite finds no damage in the file, and every row keeps to what its table asks of it."""
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()
            return bool(found == ("ok",))
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            return False
        raise
    except sqlite3.DatabaseError:
        return False


def salvage(path: Path, note: Callable[[str], None]) -> None:
    """Put what can be read of ``path`` in its place and keep the damaged file beside it; ``note`` is told how much.

    Rows are read page by page, without the trees that SQLite finds them by, so that a lost page costs only what lay
    on it. Raises `InputError`, and leaves the file as it is, if not one night can be read.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        fresh = Path(folder, "salvaged")
        kept = _copy_rows(path.read_bytes(), fresh)
        if not kept["nights"]:
            raise InputError(
                "This file is no history, or not one night of it can be read.",
                where=str(path),
                expected="a file that `compress nightly` made, or none",
                mend="move it away to begin a new history, or name another file under `history:` in the suite",
            )
        beside = _beside(path)
        shutil.copy2(path, beside)
        fresh.replace(path)
    note(
        f"The history {path} was damaged. What could be read is kept: {kept['nights']} nights and "
        f"{kept['measurements']} measurements. The damaged file lies beside it as {beside.name}."
    )


def _copy_rows(content: bytes, fresh: Path) -> dict[str, int]:
    """Table -> how many of its rows went into a new file. Tables are told apart by their number of columns."""
    kept = dict.fromkeys(COLUMNS, 0)
    tables = {len(names): table for table, names in COLUMNS.items()}
    assert len(tables) == len(COLUMNS)
    with closing(sqlite3.connect(fresh)) as connection:
        for statement in CREATE:
            connection.execute(statement)
        for row in stored_rows(content):
            if len(row.values) in tables:
                table = tables[len(row.values)]
                kept[table] += _insert(connection, table, row)
        kept["nights"] += connection.execute(_MADE_AGAIN).rowcount
        connection.commit()
    return kept


def _insert(connection: sqlite3.Connection, table: str, row: Row) -> int:
    """Add a row under its number; 0 if the table won't have it."""
    names = COLUMNS[table]
    # The key of a night is its row's number.
    pairs = dict(zip(names, row.values, strict=True)) | {"night" if table == "nights" else "rowid": row.number}
    marks = ", ".join("?" * len(pairs))
    statement = f"INSERT OR IGNORE INTO {table} ({', '.join(pairs)}) VALUES ({marks})"
    try:
        return connection.execute(statement, tuple(pairs.values())).rowcount
    except (sqlite3.IntegrityError, OverflowError):
        return 0


def _beside(path: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    names = (f"{path.name}.damaged-{stamp}" + (f"-{attempt}" if attempt else "") for attempt in range(1000))
    return next(place for name in names if not (place := path.with_name(name)).exists())
