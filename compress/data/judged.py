"""Evaluation data besides the test split: multiple-choice questions and rated pairs of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.config import FILE_SUFFIXES, is_sample
from compress.data.files import Rows
from compress.data.samples.fetch import sample_directory
from compress.data.source import find_file, read_columns
from compress.utils.errors import DataError
from compress.utils.progress import Progress

_QUESTIONS = "questions.parquet"
_QUESTION_COLUMNS = ("prompt", "choices", "answer")


@dataclass(frozen=True)
class Question:
    """Multiple-choice question. ``answer`` is the index of the correct choice."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def find_questions(reference: str, folder: Path, progress: Progress) -> list[Question]:
    """Return the questions of a sample or of a file. Raises `DataError`, `SampleError`."""
    if is_sample(reference):
        path = sample_directory(reference, progress) / _QUESTIONS
        if not path.is_file():
            raise DataError(f"{reference} has no questions.", where="evaluation.questions", expected="sample:analogies")
        return read_questions(path)
    return read_questions(find_file(reference, folder, "evaluation.questions"))


def read_questions(path: Path) -> list[Question]:
    """Read rows with `prompt`, `choices` (a list of at least two texts) and `answer` (an index or the text).

    Raises `DataError` with the position of the row.
    """
    rows = read_columns(path, _QUESTION_COLUMNS, "; choices is a list, so JSONL, JSON or Parquet")
    return [_question(rows, index) for index in range(len(rows.columns["prompt"]))]


def _question(rows: Rows, index: int) -> Question:
    prompt, choices, answer = (rows.columns[name][index] for name in _QUESTION_COLUMNS)
    position = rows.place(index)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError("The prompt is no text.", where=position, expected="the text that a choice follows")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise DataError(
            f"The choices are {choices!r:.60}.",
            where=position,
            expected="a list of two texts or more, none of them empty",
        )
    if len(set(choices)) < len(choices):
        raise DataError("A choice stands there twice.", where=position, expected="distinct texts")
    # The answer may be an index or the text of a choice.
    return Question(prompt, tuple(choices), _place(answer, choices, position))


def _place(answer: Any, choices: list[str], place: str) -> int:
    if isinstance(answer, str) and answer in choices:
        return choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    raise DataError(
        f"The answer is {answer!r:.60}.",
        where=place,
        expected=f"0 to {len(choices) - 1}, or one of the choices as it stands",
    )


_PAIR_COLUMNS = ("text", "pair", "score")
_LEAST = 4
"""Number of pairs below which a correlation has no confidence interval."""


@dataclass(frozen=True)
class RatedPairs:
    """Pairs of one file called ``name``: ``texts[i]`` and ``pairs[i]`` have the rating ``scores[i]``."""

    name: str
    texts: tuple[str, ...]
    pairs: tuple[str, ...]
    scores: tuple[float, ...]


def find_rated_pairs(reference: str, folder: Path, progress: Progress) -> list[RatedPairs]:
    """Return the rated pairs of a file, or of every file of a sample. Raises `DataError`, `SampleError`."""
    if is_sample(reference):
        files = sorted(path for path in sample_directory(reference, progress).iterdir() if path.suffix in FILE_SUFFIXES)
        return [read_rated_pairs(path) for path in files]
    return [read_rated_pairs(find_file(reference, folder, "evaluation.similarity", "a sample, or a file"))]


def read_rated_pairs(path: Path) -> RatedPairs:
    """Read rows with `text`, `pair` and `score` (larger for more similar texts).

    Raises `DataError` with the position of the row.
    """
    rows = read_columns(path, _PAIR_COLUMNS)
    texts, pairs = (tuple(_texts(rows, name)) for name in _PAIR_COLUMNS[:2])
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
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"The score is {value!r:.60}.", where=rows.place(index), expected="a number")
    return number
