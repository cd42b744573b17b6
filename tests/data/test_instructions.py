"""Tests of instruction checks: answers that should pass or fail, and instruction files that are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from compress.data.judged import CHECKS, USUAL, Instruction, find_instructions, read_instructions
from compress.utils.errors import DataError

CASES: list[tuple[str, Any, list[str], list[str]]] = [
    ("words", 1, ["Yes.", " blue "], ["", "dark blue", "-"]),
    ("words_at_least", 3, ["one two three", "it's - a day"], ["one - two"]),
    ("words_at_most", 2, ["one", "one - two"], ["", "a b c"]),
    ("sentences", 2, ["It rains. It pours!", 'He said "no." She left'], ["It costs 3.50 here.", "One. Two. Three."]),
    ("paragraphs", 2, ["a\n***\nb"], ["a\n\nb", "a\n***", "a\n***\nb\n***\nc"]),
    ("bullets", 2, ["- a\n- b", "Here:\n* a\n  * b"], ["- a", "-a\n-b", "**a**\n- b"]),
    ("numbered", 2, ["1. a\n2) b"], ["1. a", "1st a\n2nd b"]),
    ("commas", 0, ["fine"], ["well, no", ""]),
    ("contains", ["sea", "<<"], ["<<The SEA>>"], ["<<seat>>", "sea"]),
    ("avoids", ["cat"], ["A category of its own"], ["My Cat.", ""]),
    ("one_of", ["yes", "no"], ["Yes.", "**NO**"], ["yes and no", ""]),
    ("json_keys", ["a"], ['{"a": 1, "b": 2}', '```json\n{"a": 1}\n```'], ['{"b": 1}', "[1]", '{"a": 1} it is']),
    ("json", True, ["[1, 2]", "{}"], ["1", "a list", "[1,"]),
    ("starts_with", "Yes,", ["Yes, it is"], ["yes, it is", "Oh. Yes,"]),
    ("ends_with", "Bye.", ["So. Bye. "], ["Bye", "Bye. Ann"]),
    ("quoted", True, ['"All of it."', "\u201cso\u201d"], ['"half" of it', '""', "no"]),
    ("upper_case", True, ["ROME!", "A 1"], ["Rome", "12"]),
    ("lower_case", True, ["rome"], ["Rome", ""]),
]


@pytest.mark.parametrize(("name", "value", "passes", "fails"), CASES, ids=[name for name, *_ in CASES])
def test_check_agrees_with_expected_verdicts(name: str, value: Any, passes: list[str], fails: list[str]) -> None:
    instruction = Instruction("?", {name: value})
    assert [instruction.passed(answer)[name] for answer in (*passes, *fails)] == [True] * len(passes) + [False] * len(
        fails
    )


def test_all_checks_are_covered_and_default_instructions_valid() -> None:
    assert {name for name, *_ in CASES} == CHECKS.keys()
    usual = find_instructions(USUAL, Path("nowhere"))
    assert len({instruction.prompt for instruction in usual}) == len(usual) > 50
    assert not any(all(instruction.passed("").values()) for instruction in usual), (
        "an empty answer must not pass all checks"
    )


def test_failed_checks_are_described_in_words() -> None:
    instruction = Instruction("?", {"words_at_most": 2, "contains": ["sea", "sand"], "upper_case": True})
    assert instruction.missed("a b c") == ["words at most 2", "contains sea, sand", "upper case"]
    assert instruction.missed("SEA SAND") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": ""}, "prompt is not text"),
        ({"checks": {}}, "The checks are"),
        ({"checks": {"word": 3}}, "no check 'word'.*\\n.*\\n.*words"),
        ({"checks": {"words": -1}}, "given -1"),
        ({"checks": {"words": True}}, "given True"),
        ({"checks": {"contains": "sea"}}, "given 'sea'"),
        ({"checks": {"json": False}}, "given False"),
        ({"checks": {"ends_with": ""}}, "given ''"),
    ],
)
def test_invalid_instruction_files_are_rejected(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "asked.jsonl"
    good = {"prompt": "Say no.", "checks": {"one_of": ["no"]}}
    path.write_text(f"{json.dumps(good)}\n{json.dumps({**good, **change})}")
    with pytest.raises(DataError, match=f"(?s){words}") as error:
        read_instructions(path)
    assert "asked.jsonl:2" in str(error.value)
