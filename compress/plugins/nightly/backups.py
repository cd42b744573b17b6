"""The last backups of a history, and going on from one of them where the file is damaged."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

from compress.utils.errors import InputError

BACKUP_COUNT = 3
_MAGIC = b"SQLite format 3\0"


def backups_of(path: Path) -> list[Path]:
    """The backups of the history at ``path`` that are there, the newest first."""
    places = [path.with_name(f"{path.name}.backup-{age}") for age in range(1, BACKUP_COUNT + 1)]
    return [place for place in places if place.exists()]


def write_backup(connection: sqlite3.Connection, path: Path) -> None:
    """Keep what is in the history now as its newest backup, written beside and renamed; the oldest goes.

    Raises `OSError` or `sqlite3.OperationalError`, with every earlier backup in place, where there is no room for it.
    """
    beside = path.with_name(f"{path.name}.backup-new")
    beside.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(beside)) as copy:
            # A journal on disk would outlive a process that is killed, and be taken for that of the next copy.
            copy.execute("PRAGMA journal_mode = MEMORY")
            connection.backup(copy)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
    except (OSError, sqlite3.OperationalError):
        beside.unlink(missing_ok=True)
        raise
    for age in range(BACKUP_COUNT, 0, -1):
        place = path.with_name(f"{path.name}.backup-{age}")
        if place.exists() and age < BACKUP_COUNT:
            place.replace(path.with_name(f"{path.name}.backup-{age + 1}"))
    beside.replace(path.with_name(f"{path.name}.backup-1"))


def is_undamaged(path: Path) -> bool:
    """Whether SQLite finds no damage in the file, and every row keeps to what its table asks of it.

    A night that a process was killed over is taken back first, for which SQLite has to write.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as connection:
            found = connection.execute("PRAGMA integrity_check(1)").fetchone()
            return bool(found == ("ok",))
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            return False
        raise
    except sqlite3.DatabaseError:
        return False


def restore(path: Path, note: Callable[[str], None]) -> None:
    """Put the newest sound backup in the place of a damaged ``path``, which is kept beside; ``note`` is told.

    Raises `InputError`, and leaves the file as it is, if there is none.
    """
    known = backups_of(path)
    backup = next((place for place in known if is_undamaged(place)), None)
    if backup is None:
        raise InputError(
            "This file is no history, or it is damaged and no backup of it can be read.",
            where=str(path),
            expected=f"a file of `compress nightly`, or none; its backups are {path.name}.backup-1 to -{BACKUP_COUNT}",
            hint="move it away to begin a new history, or name another file under `history:` in the suite",
        )
    damaged, fresh = _free_name(path), path.with_name(f"{path.name}.backup-new")
    try:
        shutil.copy2(path, damaged)
        shutil.copyfile(backup, fresh)
    except OSError:
        damaged.unlink(missing_ok=True)
        fresh.unlink(missing_ok=True)
        raise
    # What it says of the damaged file must not be done to the sound one.
    path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
    fresh.replace(path)
    worse = known[: known.index(backup)]
    also = f" ({', '.join(place.name for place in worse)} cannot be read either)" if worse else ""
    note(
        f"The history {path} was damaged and lies beside it as {damaged.name}. It goes on from {backup.name}{also}, "
        f"which ends with {_last_night(backup)}: what a later night had measured is lost from the history."
    )


def _last_night(path: Path) -> str:
    """`night 14 of 2026-11-25`."""
    with closing(sqlite3.connect(path)) as connection:
        row = connection.execute("SELECT night, started FROM nights ORDER BY night DESC LIMIT 1").fetchone()
    return f"night {row[0]} of {row[1][:10]}" if row else "no night"


def _free_name(path: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    names = (f"{path.name}.damaged-{stamp}" + (f"-{attempt}" if attempt else "") for attempt in range(1000))
    return next(place for name in names if not (place := path.with_name(name)).exists())
