"""The tables of a history, schema 1."""

from __future__ import annotations

VERSION = 1
APPLICATION = 0x434D5052
"""Marks an SQLite file as ours: `CMPR`."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "nights": ("night", "suite", "started", "seconds", "host", "host_words", "software", "commit_id", "notes"),
    "outcomes": (
        *(
            "night",
            "entry",
            "status",
            "reason",
            "exit_code",
            "seconds",
            "recipe_digest",
            "report",
            "log",
            "noise",
            "notes",
        ),
    ),
    "findings": ("night", "entry", "kind", "metric", "target", "effect", "what", "since"),
    "measurements": ("night", "entry", "model", "metric", "target", "value", "unit", "low", "high", "n"),
}
_REAL = ("seconds", "value")
_MAYBE_REAL = ("low", "high", "effect")
_WHOLE = ("night", "n")
_MAYBE = ("commit_id", "exit_code", "report", "log", "metric", "target", "since")


def _column(table: str, name: str) -> str:
    """A column whose type SQLite enforces, so that what salvage reads wrongly is not taken for data."""
    if table == "nights" and name == "night":
        return "night INTEGER PRIMARY KEY AUTOINCREMENT"
    if table == "measurements" and name == "target":
        return "target TEXT NOT NULL CHECK (typeof(target) = 'text')"
    if table == "measurements" and name == "metric":
        return "metric TEXT NOT NULL CHECK (typeof(metric) = 'text')"
    if name in _REAL:
        return f"{name} REAL NOT NULL CHECK (typeof({name}) = 'real')"
    if name in _MAYBE_REAL:
        return f"{name} REAL CHECK (typeof({name}) IN ('real', 'null'))"
    if name in _WHOLE:
        return f"{name} INTEGER NOT NULL CHECK (typeof({name}) = 'integer')"
    if name == "exit_code":
        return f"{name} INTEGER CHECK (typeof({name}) IN ('integer', 'null'))"
    if name in _MAYBE:
        return f"{name} TEXT CHECK (typeof({name}) IN ('text', 'null'))"
    return f"{name} TEXT NOT NULL CHECK (typeof({name}) = 'text')"


CREATE: tuple[str, ...] = (
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
    *(
        f"CREATE TABLE {table} ({', '.join(_column(table, name) for name in names)})"
        for table, names in COLUMNS.items()
    ),
)
