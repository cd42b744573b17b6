"""Instructions whose answers a program can check (Zhou et al. 2023, IFEval)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.data.files import Rows
from compress.data.source import find_file, read_columns
from compress.utils.errors import DataError, nearest_name

USUAL = "usual"
"""Name of the prompts that come with the package."""
_COLUMNS = ("prompt", "checks")
_FENCE = re.compile(r"^```(?:json)?\s*\n(.*)\n```$", re.DOTALL)
_SENTENCE = re.compile(r"[.!?]+[\"\u201d')]*(?:\s+|$)")
_BULLET, _NUMBERED = re.compile(r"^\s*[-*\u2022]\s+\S", re.MULTILINE), re.compile(r"^\s*\d+[.)]\s+\S", re.MULTILINE)
_RULE = re.compile(r"^\s*\*\*\*\s*$", re.MULTILINE)


def _words(answer: str) -> int:
    return len([word for word in answer.split() if any(letter.isalnum() for letter in word)])


def _sentences(answer: str) -> int:
    return len([part for part in _SENTENCE.split(answer) if any(letter.isalnum() for letter in part)])


def _paragraphs(answer: str) -> int:
    parts = [part.strip() for part in _RULE.split(answer)]
    return len(parts) if all(parts) else 0


def _has(answer: str, phrase: str) -> bool:
    """Return whether ``phrase`` occurs in ``answer`` as whole words, ignoring case."""
    first, last = (r"\b" if end.isalnum() else "" for end in (phrase[0], phrase[-1]))
    return re.search(f"{first}{re.escape(phrase)}{last}", answer, re.IGNORECASE) is not None


def _json(answer: str) -> Any:
    fenced = _FENCE.match(answer)
    try:
        return json.loads(fenced[1] if fenced else answer)
    except (ValueError, RecursionError):
        return None


def _is_json(answer: str) -> bool:
    return isinstance(_json(answer), dict | list)


def _has_keys(answer: str, keys: list[str]) -> bool:
    value = _json(answer)
    return isinstance(value, dict) and set(keys) <= value.keys()


def _bare(answer: str) -> str:
    return answer.strip().strip(".!\"'*").casefold()


_COUNT, _TEXT, _TEXTS, _FLAG = "a number of at least 0", "a text", "a list of texts", "true"
Check = Callable[[str, Any], bool]
CHECKS: Mapping[str, tuple[str, Check]] = {
    "words": (_COUNT, lambda answer, wanted: _words(answer) == wanted),
    "words_at_least": (_COUNT, lambda answer, wanted: _words(answer) >= wanted),
    "words_at_most": (_COUNT, lambda answer, wanted: 0 < _words(answer) <= wanted),
    "sentences": (_COUNT, lambda answer, wanted: _sentences(answer) == wanted),
    "paragraphs": (_COUNT, lambda answer, wanted: _paragraphs(answer) == wanted),
    "bullets": (_COUNT, lambda answer, wanted: len(_BULLET.findall(answer)) == wanted),
    "numbered": (_COUNT, lambda answer, wanted: len(_NUMBERED.findall(answer)) == wanted),
    "commas": (_COUNT, lambda answer, wanted: bool(answer) and answer.count(",") == wanted),
    "contains": (_TEXTS, lambda answer, wanted: all(_has(answer, each) for each in wanted)),
    "avoids": (_TEXTS, lambda answer, wanted: bool(answer) and not any(_has(answer, each) for each in wanted)),
    "one_of": (_TEXTS, lambda answer, wanted: _bare(answer) in map(_bare, wanted)),
    "json_keys": (_TEXTS, _has_keys),
    "json": (_FLAG, lambda answer, _: _is_json(answer)),
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
        return [_said(name, self.checks[name]) for name, holds in self.passed(answer).items() if not holds]


def _said(name: str, value: Any) -> str:
    text = "" if value is True else ", ".join(value) if isinstance(value, list) else str(value)
    return f"{name.replace('_', ' ')} {text}".strip()


def find_instructions(reference: str, folder: Path) -> list[Instruction]:
    """Return the `USUAL` instructions, or those of a file below ``folder`` or the current directory.

    Raises `DataError`.
    """
    if reference == USUAL:
        return read_instructions(Path(__file__).with_suffix(".jsonl"))
    return read_instructions(find_file(reference, folder, "evaluation.instructions", f"`{USUAL}`, or a file"))


def read_instructions(path: Path) -> list[Instruction]:
    """Read rows with `prompt` and `checks`, a mapping with keys of `CHECKS`. Raises `DataError` with the position."""
    rows = read_columns(path, _COLUMNS, "; checks is a mapping, so JSONL or JSON")
    return [_instruction(rows, index) for index in range(len(rows.columns["prompt"]))]


def _instruction(rows: Rows, index: int) -> Instruction:
    prompt, checks = (rows.columns[name][index] for name in _COLUMNS)
    position = rows.place(index)
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError("The prompt is no text.", where=position, expected="what the model is asked to do")
    if not isinstance(checks, dict) or not checks:
        raise DataError(f"The checks are {checks!r:.60}.", where=position, expected='e.g. {"words_at_most": 20}')
    for name, value in checks.items():
        if name not in CHECKS:
            names = ", ".join(CHECKS)
            near = nearest_name(name, CHECKS)
            hint = f"did you mean {near!r}?" if near else None
            raise DataError(f"There is no check {name!r}.", where=position, expected=f"one of {names}", hint=hint)
        if not _fits(value, CHECKS[name][0]):
            raise DataError(f"The check {name!r} is given {value!r:.60}.", where=position, expected=CHECKS[name][0])
    return Instruction(prompt, checks)


def _fits(value: Any, expected: str) -> bool:
    if expected == _COUNT:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if expected == _TEXTS:
        return isinstance(value, list) and bool(value) and all(isinstance(each, str) and each for each in value)
    return value is True if expected == _FLAG else isinstance(value, str) and bool(value)
