"""Evaluation data besides the test split: multiple-choice questions and rated pairs of texts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.config import TABLE_SUFFIXES, is_sample
from compress.data.files import Rows
from compress.data.samples.fetch import sample_directory
from compress.data.source import find_file, read_columns
from compress.utils.errors import DataError, nearest_name
from compress.utils.progress import Progress
from compress.utils.read_limits import parse_json

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
        raise DataError("The prompt is not text.", where=position, expected="the text before each choice")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(one, str) and one for one in choices):
        raise DataError(
            f"The choices are {choices!r:.60}.",
            where=position,
            expected="a list of two texts or more, none of them empty",
        )
    if len(set(choices)) < len(choices):
        raise DataError("A choice occurs twice.", where=position, expected="distinct texts")
    # The answer may be an index or the text of a choice.
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        expected = f"0 to {len(choices) - 1}, or one of the choices as it stands"
        raise DataError(f"The answer is {answer!r:.60}.", where=position, expected=expected)
    return Question(prompt, tuple(choices), answer)


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
        files = sorted(sample_directory(reference, progress).iterdir())
        return [read_rated_pairs(path) for path in files if path.suffix in TABLE_SUFFIXES]
    return [read_rated_pairs(find_file(reference, folder, "evaluation.similarity", "a sample, or a file"))]


def read_rated_pairs(path: Path) -> RatedPairs:
    """Read rows with `text`, `pair` and `score` (larger for more similar texts).

    Raises `DataError` with the position of the row.
    """
    rows = read_columns(path, _PAIR_COLUMNS)
    scores = []
    for index, (text, pair, score) in enumerate(zip(*(rows.columns[name] for name in _PAIR_COLUMNS), strict=True)):
        for name, value in (("text", text), ("pair", pair)):
            if not isinstance(value, str) or not value.strip():
                raise DataError(f"The {name} is not text.", where=rows.place(index), expected="a text")
        try:
            scores.append(float(score))
        except (OverflowError, TypeError, ValueError):
            scores.append(math.nan)
        if not math.isfinite(scores[-1]):
            raise DataError(f"The score is {score!r:.60}.", where=rows.place(index), expected="a number")
    if len(scores) < _LEAST or len(set(scores)) < 2:
        raise DataError(
            f"{rows.name} has {len(scores)} pairs of {len(set(scores))} different scores.",
            where=str(path),
            expected=f"{_LEAST} pairs at least, not all with the same score",
        )
    return RatedPairs(path.stem, tuple(rows.columns["text"]), tuple(rows.columns["pair"]), tuple(scores))


USUAL = "usual"
"""Name of the prompts that come with the package."""
_COLUMNS = ("prompt", "checks")
_FENCE = re.compile(r"^```(?:json)?\s*\n(.*)\n```$", re.DOTALL)
_SENTENCE = re.compile(r"[.!?]+[\"\u201d')]*(?:\s+|$)")
_BULLET, _NUMBERED = re.compile(r"^\s*[-*\u2022]\s+\S", re.MULTILINE), re.compile(r"^\s*\d+[.)]\s+\S", re.MULTILINE)
_RULE = re.compile(r"^\s*\*\*\*\s*$", re.MULTILINE)


def _spoken(parts: Iterable[str]) -> int:
    """Return the number of parts with a letter or a digit."""
    return sum(any(letter.isalnum() for letter in part) for part in parts)


def _paragraphs(answer: str) -> int:
    parts = [part.strip() for part in _RULE.split(answer)]
    return len(parts) if all(parts) else 0


def _has(answer: str, phrase: str) -> bool:
    """Return whether ``phrase`` occurs in ``answer`` as whole words, ignoring case."""
    first, last = (r"\b" if end.isalnum() else "" for end in (phrase[0], phrase[-1]))
    return re.search(f"{first}{re.escape(phrase)}{last}", answer, re.IGNORECASE) is not None


def _json(answer: str) -> object:
    fenced = _FENCE.match(answer)
    try:
        return parse_json(fenced[1] if fenced else answer)
    except ValueError:
        return None


def _has_keys(answer: str, keys: list[str]) -> bool:
    value = _json(answer)
    return isinstance(value, dict) and set(keys) <= value.keys()


def _bare(answer: str) -> str:
    return answer.strip().strip(".!\"'*").casefold()


_COUNT, _TEXT, _TEXTS, _FLAG = "a number of at least 0", "a text", "a list of texts", "true"
_PARAMETERS: Mapping[str, Callable[[Any], bool]] = {
    _COUNT: lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    _TEXT: lambda value: isinstance(value, str) and bool(value),
    _TEXTS: lambda value: isinstance(value, list) and bool(value) and all(isinstance(t, str) and t for t in value),
    _FLAG: lambda value: value is True,
}
"""Predicate of valid parameters by their description."""
Check = Callable[[str, Any], bool]
CHECKS: Mapping[str, tuple[str, Check]] = {
    "words": (_COUNT, lambda answer, wanted: _spoken(answer.split()) == wanted),
    "words_at_least": (_COUNT, lambda answer, wanted: _spoken(answer.split()) >= wanted),
    "words_at_most": (_COUNT, lambda answer, wanted: 0 < _spoken(answer.split()) <= wanted),
    "sentences": (_COUNT, lambda answer, wanted: _spoken(_SENTENCE.split(answer)) == wanted),
    "paragraphs": (_COUNT, lambda answer, wanted: _paragraphs(answer) == wanted),
    "bullets": (_COUNT, lambda answer, wanted: len(_BULLET.findall(answer)) == wanted),
    "numbered": (_COUNT, lambda answer, wanted: len(_NUMBERED.findall(answer)) == wanted),
    "commas": (_COUNT, lambda answer, wanted: bool(answer) and answer.count(",") == wanted),
    "contains": (_TEXTS, lambda answer, wanted: all(_has(answer, each) for each in wanted)),
    "avoids": (_TEXTS, lambda answer, wanted: bool(answer) and not any(_has(answer, each) for each in wanted)),
    "one_of": (_TEXTS, lambda answer, wanted: _bare(answer) in map(_bare, wanted)),
    "json_keys": (_TEXTS, _has_keys),
    "json": (_FLAG, lambda answer, _: isinstance(_json(answer), dict | list)),
    "starts_with": (_TEXT, lambda answer, wanted: answer.startswith(wanted)),
    "ends_with": (_TEXT, lambda answer, wanted: answer.endswith(wanted)),
    "quoted": (_FLAG, lambda answer, _: len(answer) > 2 and answer[0] + answer[-1] in ('""', "\u201c\u201d")),
    "upper_case": (_FLAG, lambda answer, _: answer.isupper()),
    "lower_case": (_FLAG, lambda answer, _: answer.islower()),
}
"""Check name -> (description of its parameter, predicate on the stripped answer and the parameter)."""


@dataclass(frozen=True)
class Instruction:
    """Prompt with the checks that its answer must pass: name of `CHECKS` -> parameter."""

    prompt: str
    checks: Mapping[str, Any]

    def passed(self, answer: str) -> dict[str, bool]:
        """Return for each check whether the answer passes it."""
        return {name: bool(CHECKS[name][1](answer.strip(), value)) for name, value in self.checks.items()}

    def missed(self, answer: str) -> list[str]:
        """Return a description of each check that the answer fails."""
        descriptions = []
        for name in (name for name, holds in self.passed(answer).items() if not holds):
            value = self.checks[name]
            text = "" if value is True else ", ".join(value) if isinstance(value, list) else str(value)
            descriptions.append(f"{name.replace('_', ' ')} {text}".strip())
        return descriptions


def find_instructions(reference: str, folder: Path) -> list[Instruction]:
    """Return the `USUAL` instructions, or those of a file below ``folder`` or the current directory.

    Raises `DataError`.
    """
    if reference == USUAL:
        return read_instructions(Path(__file__).with_name("instructions.jsonl"))
    return read_instructions(find_file(reference, folder, "evaluation.instructions", f"`{USUAL}`, or a file"))


def read_instructions(path: Path) -> list[Instruction]:
    """Read rows with `prompt` and `checks`, a mapping with keys of `CHECKS`. Raises `DataError` with the position."""
    rows = read_columns(path, _COLUMNS, "; checks is a mapping, so JSONL or JSON")
    return [_instruction(rows, index) for index in range(len(rows.columns["prompt"]))]


def _instruction(rows: Rows, index: int) -> Instruction:
    prompt, checks = (rows.columns[name][index] for name in _COLUMNS)
    position = rows.place(index)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError("The prompt is not text.", where=position, expected="the instruction for the model")
    if not isinstance(checks, dict) or not checks:
        raise DataError(f"The checks are {checks!r:.60}.", where=position, expected='e.g. {"words_at_most": 20}')
    for name, value in checks.items():
        if name not in CHECKS:
            near = nearest_name(name, CHECKS)
            raise DataError(
                f"There is no check {name!r}.",
                where=position,
                expected=f"one of {', '.join(CHECKS)}",
                hint=f"did you mean {near!r}?" if near else None,
            )
        expected = CHECKS[name][0]
        if not _PARAMETERS[expected](value):
            raise DataError(f"The check {name!r} is given {value!r:.60}.", where=position, expected=expected)
    return Instruction(prompt, checks)
