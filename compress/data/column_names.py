"""Read the column names of data, and match them with the columns of a task."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from compress.data.columns import Column
from compress.data.files import field_names, find_separator
from compress.data.source import read

_HEAD_BYTES = 1 << 16

_FILES = ("file", "path", "filename", "file_name", "file_path")
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "text": (
        *("sentence", "review", "content", "comment", "message", "messages", "body", "tweet", "headline", "post"),
        *("query", "question", "sentence1", "text1", "premise", "anchor", "source", "input", "prompt", "document"),
        *("caption", "transcript", "transcription", "description", "title"),
    ),
    "label": ("sentiment", "target", "class", "category", "labels", "intent", "topic", "rating", "stars", "score"),
    "pair": ("passage", "sentence2", "text2", "hypothesis", "positive", "answer", "response", "document"),
    "target": ("summary", "translation", "output", "answer", "response", "completion"),
    "tokens": ("words",),
    "tags": ("ner_tags", "ner", "pos_tags", "entities", "labels"),
    "question": ("query",),
    "context": ("passage", "paragraph", "document"),
    "answers": ("answer",),
    "image": ("picture", "photo", "img", "image_path", "image_file", *_FILES),
    "audio": ("recording", "sound", "speech", "audio_path", "audio_file", *_FILES),
    "mask": ("segmentation", "annotation", "mask_path", "mask_file"),
    "objects": ("annotations", "boxes", "bboxes"),
}
"""Usual names in files for a task's column, the most usual first."""


def column_names(path: Path) -> tuple[str, ...]:
    """Return the column names of a data file or class folder, of large text files from their head.

    Raises `DataError` for other files and empty ones.
    """
    suffix = path.suffix.lower()
    names: tuple[str, ...] = ()
    if path.is_file() and suffix in (".csv", ".tsv"):
        head = _read_head(path)
        with suppress(csv.Error):  # reported with its line when the rows are read
            names = tuple(next(csv.reader(io.StringIO(head, newline=""), delimiter=find_separator(head, suffix)), ()))
    elif path.is_file() and suffix == ".jsonl":
        with suppress(ValueError, RecursionError):  # reported with its line when the rows are read
            first = json.loads(_read_head(path).lstrip().split("\n", 1)[0])
            names = tuple(field_names(first)) if isinstance(first, dict) else ()
    return names or read(path, set()).names


def _read_head(path: Path) -> str:
    with path.open("rb") as file:
        # Up to the end of a line, since one row may be longer than the head.
        head = file.read(_HEAD_BYTES) + file.readline()
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return head.decode("utf-16", errors="replace")
    try:
        return head.decode("utf-8-sig")
    except UnicodeDecodeError:
        return head.decode("cp1252", errors="replace")


def match_columns(
    columns: Sequence[Column], names: Sequence[str], given: Mapping[str, str] | None = None
) -> tuple[dict[str, str], list[str]]:
    """Return the name in the file for each column of a task, and the required columns without one.

    Args:
        columns: Columns of the task.
        names: Columns of the file.
        given: Task's name -> name in the file, for columns that the user has matched.
    """
    matches = dict(given or {})
    # Equal names come before synonyms, so that no column takes a name that another one has.
    for candidates_of in (_equal, _synonyms):
        for column in columns:
            free = {_plain(name): name for name in reversed(names) if name not in matches.values()}
            candidates = (free[name] for name in candidates_of(column) if name in free)
            if column.name not in matches and (match := next(candidates, None)) is not None:
                matches[column.name] = match
    missing = [column.name for column in columns if column.name not in matches and not column.optional]
    return {column.name: matches[column.name] for column in columns if column.name in matches}, missing


def _equal(column: Column) -> Iterable[str]:
    return (_plain(column.name),)


def _synonyms(column: Column) -> Iterable[str]:
    return SYNONYMS.get(column.name, ())


def _plain(name: str) -> str:
    """Return a name in lower case with one underscore between its words."""
    return re.sub(r"[\W_]+", "_", name.casefold()).strip("_")
