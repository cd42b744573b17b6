"""Ranking and question answering with Bible verses in two translations."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from compress.data.columns import normalised
from compress.utils.errors import SampleError
from compress.utils.progress import Progress
from compress_samples.bible_names import Name, label_verse, read_names
from compress_samples.verses import MODERN, OLD, Key, plain_verse, read_raw, read_verses

QUERIES = {"test": 500, "validation": 200, "train": 500}
QUESTIONS = {"test": 600, "validation": 200, "train": 1_000}
_QUESTION_WORDS = {"PER": "who", "LOC": "where", "GRP": "which people"}
_OTHER_VERSES = (-2, -1, 1)
"""Offsets of the other verses of the chapter that are ranked with the verse of the query."""
Row = dict[str, Any]


def write_ranking(members: Path, files: Path, progress: Progress) -> None:
    """Write rows of `query` (modern), `passage` (old) and `label` (1 for the same verse). Raises `SampleError`."""
    modern, old = (dict(read_verses(members / folder, order)) for folder, order in (MODERN, OLD))

    def rows(chapter: Sequence[Key]) -> Iterable[list[Row]]:
        for index, key in enumerate(chapter):
            others = [chapter[(index + step) % len(chapter)] for step in _OTHER_VERSES]
            passages = list(dict.fromkeys(old[reference] for reference in (key, *others)))
            if modern[key] and len(passages) == len(_OTHER_VERSES) + 1:
                yield [
                    {"query": modern[key], "passage": passage, "label": float(passage == old[key])}
                    for passage in sorted(passages, key=_digest)
                ]

    _write(files, _split([key for key in old if old[key] and key in modern], rows, QUERIES), progress)


def write_cloze(members: Path, files: Path, progress: Progress) -> None:
    """Write `question` (an old verse without a name), `context` (modern, with the previous verse) and `answers`.

    Raises `SampleError`.
    """
    names = read_names(members)
    modern = dict(read_verses(members / MODERN[0], MODERN[1]))
    old = dict(read_raw(members / OLD[0], OLD[1]))

    def rows(chapter: Sequence[Key]) -> Iterable[list[Row]]:
        for index, key in enumerate(chapter):
            question = make_cloze(old[key], names, modern[key])
            if question is not None:
                around = [modern[reference] for reference in chapter[max(index - 1, 0) : index + 1]]
                offset = len(" ".join(around[: index - max(index - 1, 0)])) + bool(index)
                answers = {"text": [question[1]], "answer_start": [offset + question[2]]}
                yield [{"question": question[0], "context": " ".join(around), "answers": answers}]

    _write(files, _split([key for key in old if plain_verse(old[key]) and key in modern], rows, QUESTIONS), progress)


def make_cloze(markup: str, names: dict[str, Name], modern: str) -> tuple[str, str, int] | None:
    """Return question, answer and its offset in ``modern``, for the first name that occurs once, or None."""
    sentence = label_verse(markup, names, "")
    for index, (token, tag) in enumerate(zip(sentence.tokens, sentence.tags, strict=True)):
        if tag.startswith("B-") and modern.split().count(token) == 1 and sentence.tokens.count(token) == 1:
            question = [*sentence.tokens[:index], _QUESTION_WORDS[tag[2:]], *sentence.tokens[index + 1 :]]
            start = f" {modern} ".index(f" {token} ")
            return " ".join(question).rstrip(" .,;:") + "?", token, start
    return None


def _split(
    keys: Sequence[Key], rows: Callable[[Sequence[Key]], Iterable[list[Row]]], sizes: dict[str, int]
) -> dict[str, list[Row]]:
    """Split rows by chapters, in the order of their names' SHA-256. Raises `SampleError` if there are too few rows."""
    chapters: dict[str, list[Key]] = {}
    for key in keys:
        chapters.setdefault(f"{key[0]} {key[1]}", []).append(key)
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    counts = dict.fromkeys(splits, 0)
    seen: set[str] = set()
    for chapter in sorted(chapters, key=_digest):
        name = next((name for name, most in sizes.items() if counts[name] < most), None)
        if name is None:
            return splits
        for group in rows(chapters[chapter]):
            texts = {normalised(str(value)) for row in group for value in row.values() if isinstance(value, str)}
            if counts[name] < sizes[name] and texts.isdisjoint(seen):
                splits[name] += group
                counts[name] += 1
                seen |= texts if name == "test" else set()
    raise SampleError(f"The translations give {sum(counts.values())} groups of rows.", expected=f"{sizes}")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _write(files: Path, splits: dict[str, list[Row]], progress: Progress) -> None:
    for name, part in splits.items():
        pa.parquet.write_table(pa.Table.from_pylist(part), files / f"{name}.parquet")
    progress.note(", ".join(f"{len(part):,} {name}" for name, part in splits.items()) + " rows")
