"""The tables of a history, schema 1.

What each column may hold is checked by SQLite, also when it looks a whole file over, so that a row which damage has
changed is not taken for data. Columns are named as the fields of the records that they keep.
"""

from __future__ import annotations

from typing import get_args

from compress.nightly.record import Kind, Status

VERSION = 1
APPLICATION = 0x434D5052
"""Marks an SQLite file as ours: `CMPR`."""

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
