"""The tables of a history, schema 1.

What each column may hold is checked by SQLite, also when it looks a whole file over, so that a row which damage has
changed is not taken for data.
"""

from __future__ import annotations

from typing import get_args

from compress.nightly.record import Kind, Status

VERSION = 1
APPLICATION = 0x434D5052
"""Marks an SQLite file as ours: `CMPR`."""


def _one_of(name: str, values: tuple[str, ...]) -> str:
    return f"{name} TEXT NOT NULL CHECK ({name} IN ({', '.join(map(repr, values))}))"


_TEXT = "{0} TEXT NOT NULL CHECK (typeof({0}) = 'text')"
_TEXT_OR_NONE = "{0} TEXT CHECK (typeof({0}) IN ('text', 'null'))"
_REAL = "{0} REAL NOT NULL CHECK (typeof({0}) = 'real')"
_SECONDS = "{0} REAL NOT NULL CHECK (typeof({0}) = 'real' AND {0} >= 0)"
_REAL_OR_NONE = "{0} REAL CHECK (typeof({0}) IN ('real', 'null'))"
_WHOLE = "{0} INTEGER NOT NULL CHECK (typeof({0}) = 'integer' AND {0} >= 1)"
_WHOLE_OR_NONE = "{0} INTEGER CHECK (typeof({0}) IN ('integer', 'null'))"
_TIME = "{0} TEXT NOT NULL CHECK (julianday({0}) IS NOT NULL)"
_LIST = "{0} TEXT NOT NULL CHECK (json_valid({0}) AND json_type({0}) = 'array')"
_MAPPING = "{0} TEXT NOT NULL CHECK (json_valid({0}) AND json_type({0}) = 'object')"

_TABLES: dict[str, dict[str, str]] = {
    "nights": {
        "night": "{0} INTEGER PRIMARY KEY AUTOINCREMENT",
        "suite": _TEXT,
        "started": _TIME,
        "seconds": _SECONDS,
        "host": _TEXT,
        "host_words": _TEXT,
        "software": _MAPPING,
        "commit_id": _TEXT_OR_NONE,
        "notes": _LIST,
    },
    # What is repeated of a night is of schema 1, which was read row by row where the file was damaged.
    "outcomes": {
        "night": _WHOLE,
        "suite": _TEXT,
        "started": _TIME,
        "host": _TEXT,
        "host_words": _TEXT,
        "entry": _TEXT,
        "status": _one_of("status", get_args(Status)),
        "reason": _TEXT,
        "exit_code": _WHOLE_OR_NONE,
        "seconds": _SECONDS,
        "recipe_digest": _TEXT,
        "report": _TEXT_OR_NONE,
        "log": _TEXT_OR_NONE,
        "noise": _TEXT,
        "notes": _LIST,
    },
    "findings": {
        "night": _WHOLE,
        "entry": _TEXT,
        "kind": _one_of("kind", get_args(Kind)),
        "metric": _TEXT_OR_NONE,
        "target": _TEXT_OR_NONE,
        "effect": _REAL_OR_NONE,
        "what": _TEXT,
        "since": _TEXT_OR_NONE,
    },
    "measurements": {
        "night": _WHOLE,
        "entry": _TEXT,
        "model": _TEXT,
        "metric": _TEXT,
        "target": _TEXT,
        "value": _REAL,
        "unit": _TEXT,
        "low": _REAL_OR_NONE,
        "high": _REAL_OR_NONE,
        "n": _WHOLE,
    },
}

COLUMNS: dict[str, tuple[str, ...]] = {table: tuple(columns) for table, columns in _TABLES.items()}

CREATE: tuple[str, ...] = (
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
    *(
        f"CREATE TABLE {table} ({', '.join(words.format(name) for name, words in columns.items())})"
        for table, columns in _TABLES.items()
    ),
)
