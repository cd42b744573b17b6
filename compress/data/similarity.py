"""Pairs of texts with a score of how similar people find them: data that embeddings are judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.config import FILE_SUFFIXES, is_sample
from compress.data.files import Rows
from compress.data.source import find_file, read_columns
from compress.errors import DataError
from compress.progress import Progress
from compress.samples.fetch import sample_directory

COLUMNS = ("text", "pair", "score")
_LEAST = 4
"""Pairs without which a correlation has no interval."""


@dataclass(frozen=True)
class RatedPairs:
    """Pairs of one file, which ``name`` is called after: ``texts[i]`` and ``pairs[i]`` have ``scores[i]``."""

    name: str
    texts: tuple[str, ...]
    pairs: tuple[str, ...]
    scores: tuple[float, ...]


def find_rated_pairs(reference: str, folder: Path, progress: Progress) -> list[RatedPairs]:
    """Those of the file of that name, or of every file of a sample. Raises `DataError` or `SampleError`."""
    if is_sample(reference):
        files = sorted(path for path in sample_directory(reference, progress).iterdir() if path.suffix in FILE_SUFFIXES)
        return [read_rated_pairs(path) for path in files]
    return [read_rated_pairs(find_file(reference, folder, "evaluation.similarity", "a sample, or a file"))]


def read_rated_pairs(path: Path) -> RatedPairs:
    """Rows with `text`, `pair` and `score`, larger for what is more alike. Raises `DataError` that names the row."""
    rows = read_columns(path, COLUMNS)
    texts, pairs = (tuple(_texts(rows, name)) for name in COLUMNS[:2])
    scores = tuple(_score(rows, index, value) for index, value in enumerate(rows.columns["score"]))
    if len(scores) < _LEAST or len(set(scores)) < 2:
        raise DataError(
            f"{rows.name} has {len(scores)} pairs of {len(set(scores))} different scores.",
            where=str(path),
            expected=f"{_LEAST} pairs at least, not all with the same score",
        )
    return RatedPairs(path.stem, texts, pairs, scores)


def _texts(rows: Rows, name: str) -> Sequence[str]:
    values = rows.columns[name]
    for index, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"The {name} is no text.", where=rows.place(index), expected="a text")
    return values


def _score(rows: Rows, index: int, value: Any) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"The score is {value!r:.60}.", where=rows.place(index), expected="a number")
    return found
