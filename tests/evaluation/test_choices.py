"""Scores of choices against the same mathematics in numpy, and how often the right one wins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from decoder_graphs import TinyDecoder
from quantized import tiny_tokenizer

from compress.data.judged import Question, find_questions, read_questions
from compress.evaluation.zero_shot import choice_rows, choice_scores
from compress.formats.targets import TARGETS
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

QUESTIONS = [
    Question("abc", ("def", "gh"), 0),
    Question("The end ", ("xyz", "w", "!!"), 2),
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder made by hand with the tiny tokenizer's vocabulary."""
    folder = TinyDecoder(vocabulary=160).write(tmp_path_factory.mktemp("decoder"))
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def scores(artifact: Path, questions: list[Question]) -> list[list[float]]:
    return choice_scores(artifact, questions, TARGETS["cpu"], 1, SilentProgress(), "")


def by_hand(prompt: str, choice: str) -> float:
    """log p of the choice's tokens, each given all before it."""
    tokenizer = tiny_tokenizer()
    prompt_ids, choice_ids = (tokenizer(text)["input_ids"] for text in (prompt, choice))
    chances = torch.from_numpy(TinyDecoder(vocabulary=160).logits([*prompt_ids, *choice_ids])).log_softmax(-1)
    return float(sum(chances[len(prompt_ids) + index - 1, token] for index, token in enumerate(choice_ids)))


def test_a_choice_is_scored_by_its_tokens_after_the_prompt(artifact: Path) -> None:
    choice_scores = scores(artifact, QUESTIONS)
    # A space is put between the two, or moved from the prompt's end to the choice.
    assert choice_scores[0] == pytest.approx([by_hand("abc", " def"), by_hand("abc", " gh")], rel=1e-4)
    expected = [by_hand("The end", " xyz"), by_hand("The end", " w"), by_hand("The end", " !!")]
    assert choice_scores[1] == pytest.approx(expected, rel=1e-4)


def test_the_likeliest_choice_is_the_answer_as_it_is_or_by_its_length() -> None:
    questions = [Question("?", ("yes", "no way at all"), 0), Question("?", ("yes", "no way at all"), 1)]
    plain, a_byte = choice_rows(questions, [[-3.0, -6.5], [-3.0, -6.5]], "final", "cpu")
    assert (plain.metric, plain.raw, plain.value) == ("choice_accuracy", (1.0, 0.0), 0.5)
    # 3 nats over 3 bytes are more than 6.5 over 13.
    assert (a_byte.metric, a_byte.raw, a_byte.value) == ("choice_accuracy_normalized", (0.0, 1.0), 0.5)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_answers_are_places_or_texts(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2 =", "choices": ["3", "4"]}
    path = write(tmp_path, {**row, "answer": 1}, {**row, "answer": "3"})
    assert [question.answer for question in read_questions(path)] == [1, 0]
    assert find_questions("questions.jsonl", tmp_path, SilentProgress()) == read_questions(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": " "}, "prompt is no text"),
        ({"choices": ["a"]}, "The choices are"),
        ({"choices": "ab"}, "The choices are"),
        ({"choices": ["a", ""]}, "The choices are"),
        ({"choices": ["a", "a"]}, "stands there twice"),
        ({"answer": 2}, "The answer is 2"),
        ({"answer": True}, "The answer is True"),
        ({"answer": "c"}, "The answer is 'c'"),
        ({"answer": None}, "The answer is None"),
    ],
)
def test_a_row_that_asks_nothing_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    good = {"prompt": "p", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(DataError, match=words) as caught:
        read_questions(write(tmp_path, good, {**good, **change}))
    assert caught.value.where == "questions.jsonl:2"


def test_a_file_without_its_columns_or_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'choices'"):
        read_questions(write(tmp_path, {"prompt": "p", "answer": 0}))
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        find_questions("nowhere.jsonl", tmp_path, SilentProgress())
