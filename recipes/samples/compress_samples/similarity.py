"""Pairs of texts and words with human similarity ratings, as three small tables."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet

from compress.utils.errors import SampleError
from compress.utils.progress import Progress

LEE_TEXTS, LEE_SIMILARITIES = "lee.cor", "similarities0-1.txt"
WORDS = ("wordsim353.tsv", "simlex999.txt")
"""Tab-separated files with two words and a score per line."""
_ENCODING = "latin-1"
"""Encoding of all files."""


class Rated(NamedTuple):
    """Two texts and their similarity, on a different scale for each table."""

    text: str
    pair: str
    score: float


def write_similarities(members: Path, files: Path, progress: Progress) -> None:
    """Write lee, wordsim353 and simlex999.parquet (columns of `Rated`). Raises `SampleError`."""
    tables = {"lee": read_documents(members / LEE_TEXTS, members / LEE_SIMILARITIES)}
    tables |= {Path(name).stem: read_words(members / name) for name in WORDS}
    for name, rows in tables.items():
        _write(files / f"{name}.parquet", rows)
    progress.note("similarity: " + ", ".join(f"{len(rows):,} pairs of {name}" for name, rows in tables.items()))


def read_documents(texts: Path, similarities: Path) -> list[Rated]:
    """Return all pairs of documents (one per line) with their similarity in a matrix file. Raises `SampleError`."""
    documents = texts.read_text(_ENCODING).splitlines()
    try:
        lines = similarities.read_text(_ENCODING).splitlines()
        matrix = [[float(value) for value in line.split()] for line in lines]
    except ValueError as error:
        raise SampleError(f"{similarities.name} is not a matrix of numbers: {error}") from error
    if {len(matrix), *map(len, matrix)} != {len(documents)}:
        raise SampleError(f"{similarities.name} is not a matrix of {len(documents)} by {len(documents)} numbers.")
    return [Rated(documents[i], documents[j], matrix[i][j]) for i, j in combinations(range(len(documents)), 2)]


def read_words(path: Path) -> list[Rated]:
    """Return the rows of a file of word pairs, without comments. Raises `SampleError`."""
    rows = []
    for number, line in enumerate(path.read_text(_ENCODING).splitlines(), start=1):
        if line.startswith("#") or not line.strip():
            continue
        parts = line.split("\t")
        try:
            first, second, score = parts
            rows.append(Rated(first, second, float(score)))
        except ValueError as error:
            raise SampleError(f"{path.name}:{number} is not `word, word, score` between tabs: {error}") from error
    return rows


def _write(path: Path, rows: list[Rated]) -> None:
    schema = pa.schema([("text", pa.string()), ("pair", pa.string()), ("score", pa.float64())])
    columns = {name: [getattr(row, name) for row in rows] for name in Rated._fields}
    pa.parquet.write_table(pa.table(columns, schema=schema), path)
