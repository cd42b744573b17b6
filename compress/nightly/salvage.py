"""Saving what can still be read of a damaged history."""

from __future__ import annotations

import shutil
import sqlite3
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from compress.errors import InputError
from compress.nightly.tables import COLUMNS, CREATE

_MISSES = 20_000
"""Rows that are not there in a row before the end is believed; a lost page of a table holds some hundred."""
_PAGE_COUNT, _FREE_LIST, _CHANGES, _VALID_FOR = 28, 32, 24, 92
"""Offsets in the header of an SQLite file (https://www.sqlite.org/fileformat.html, section 1.3)."""


def is_sound(path: Path) -> bool:
    """Whether SQLite finds no damage in the file."""
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

    Each row is read by itself, so that a lost page costs only its own rows. Where the first page is lost, which says
    where the tables lie, that of an empty history stands in: the tables of every history begin at the same pages.
    Raises `InputError`, and leaves the file as it is, if not one night can be read.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        copy, fresh = Path(folder, "damaged"), Path(folder, "salvaged")
        shutil.copyfile(path, copy)
        kept = _copy_rows(copy, fresh)
        if not kept["nights"]:
            _replace_first_page(copy, Path(folder, "empty"))
            fresh.unlink()
            kept = _copy_rows(copy, fresh)
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


def make_empty(path: Path) -> None:
    """Write a history without nights."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in CREATE:
            connection.execute(statement)
        connection.commit()


def _copy_rows(damaged: Path, fresh: Path) -> dict[str, int]:
    """Table -> how many of its rows went from the damaged file into a new one."""
    make_empty(fresh)
    kept = dict.fromkeys(COLUMNS, 0)
    with closing(sqlite3.connect(damaged)) as source, closing(sqlite3.connect(fresh)) as target:
        # Bytes that are no text any more are a damaged row, not the end.
        source.text_factory = bytes
        for table, names in COLUMNS.items():
            listed, marks = ", ".join(names), ", ".join("?" * len(names))
            for row in _readable_rows(source, table, listed):
                with suppress(sqlite3.IntegrityError, UnicodeDecodeError):
                    values = [value.decode() if isinstance(value, bytes) else value for value in row]
                    target.execute(f"INSERT INTO {table} ({listed}) VALUES ({marks})", values)
                    kept[table] += 1
        target.commit()
    return kept


def _readable_rows(source: sqlite3.Connection, table: str, listed: str) -> Iterator[tuple[Any, ...]]:
    misses, number = 0, 0
    while misses < _MISSES:
        number += 1
        misses += 1
        try:
            row = source.execute(f"SELECT {listed} FROM {table} WHERE rowid = ?", (number,)).fetchone()
        except sqlite3.DatabaseError:
            continue
        if row is not None:
            misses = 0
            yield row


def _replace_first_page(damaged: Path, empty: Path) -> None:
    make_empty(empty)
    page = bytearray(empty.read_bytes())
    size = struct.unpack_from(">H", page, 16)[0]
    del page[size:]
    with damaged.open("r+b") as file:
        pages = file.seek(0, 2) // size
        struct.pack_into(">I", page, _PAGE_COUNT, pages)
        struct.pack_into(">II", page, _FREE_LIST, 0, 0)
        page[_VALID_FOR : _VALID_FOR + 4] = page[_CHANGES : _CHANGES + 4]
        file.seek(0)
        file.write(page)


def _beside(path: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    names = (f"{path.name}.damaged-{stamp}" + (f"-{attempt}" if attempt else "") for attempt in range(1000))
    return next(place for name in names if not (place := path.with_name(name)).exists())
