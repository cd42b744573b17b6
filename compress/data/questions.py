"""Multiple-choice questions as rows: a prompt, what may follow it, and which of them is right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.files import Rows
from compress.data.source import find_file, read_columns
from compress.errors import DataError

COLUMNS = ("prompt", "choices", "answer")


@dataclass(frozen=True)
class Question:
    """``answer`` counts from 0."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def find_questions(reference: str, folder: Path) -> list[Question]:
    """Read the file of that name below ``folder``, or else below the current directory. Raises `DataError`."""
    return read_questions(find_file(reference, folder, "evaluation.questions"))


def read_questions(path: Path) -> list[Question]:
    """Rows with `prompt`, `choices` (a list of two texts or more) and `answer` (its place from 0, or its text).

    Raises `DataError` that names the row.
    """
    rows = read_columns(path, COLUMNS, "; choices is a list, so JSONL, JSON or Parquet")
    return [_question(rows, index) for index in range(len(rows.columns["prompt"]))]


def _question(rows: Rows, index: int) -> Question:
    prompt, choices, answer = (rows.columns[name][index] for name in COLUMNS)
    place = rows.place(index)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError("The prompt is no text.", where=place, expected="the text that a choice follows")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise DataError(
            f"The choices are {choices!r:.60}.", where=place, expected="a list of two texts or more, none of them empty"
        )
    if len(set(choices)) < len(choices):
        raise DataError("A choice stands there twice.", where=place, expected="distinct texts")
    return Question(prompt, tuple(choices), _place(answer, choices, place))


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
