"""Tests of multiple choice, instruction following, PNG files and ratios by slice."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoder_graphs import TinyDecoder
from PIL import Image
from quantized import tiny_tokenizer
from seqeval.metrics import f1_score

from compress.data.judged import Instruction, Question, find_questions, read_questions
from compress.data.membership import Part
from compress.evaluation.evaluate import Predictions, slice_rows, task_slice_rows
from compress.evaluation.generate import answer_instructions, instruction_rows
from compress.evaluation.zero_shot import choice_rows, choice_scores
from compress.formats.targets import TARGETS
from compress.plugins.diffusion.evals import encode_difference_png, encode_png
from compress.tasks.registry import TASKS
from compress.utils.errors import DataError
from compress.utils.progress import SilentProgress

QUESTIONS = [Question("abc", ("def", "gh"), 0), Question("The end ", ("xyz", "w", "!!"), 2)]
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)


def write_decoder(folder: Path, template: str | None = None) -> TinyDecoder:
    """Save a decoder with hand-made weights and the tiny tokenizer's vocabulary."""
    decoder = TinyDecoder(vocabulary=160)
    decoder.write(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return decoder


def by_hand(prompt: str, choice: str) -> float:
    """Return the log probability of the choice's tokens, each given all before it."""
    tokenizer = tiny_tokenizer()
    prompt_ids, choice_ids = (tokenizer(text)["input_ids"] for text in (prompt, choice))
    chances = torch.from_numpy(TinyDecoder(vocabulary=160).logits([*prompt_ids, *choice_ids])).log_softmax(-1)
    return float(sum(chances[len(prompt_ids) + index - 1, token] for index, token in enumerate(choice_ids)))


def test_choice_score_is_log_probability_of_its_tokens(tmp_path: Path) -> None:
    write_decoder(tmp_path)
    scores = choice_scores(tmp_path, QUESTIONS, TARGETS["cpu"], 1, SilentProgress(), "")
    # A space is put between the two, or moved from the prompt's end to the choice.
    assert scores[0] == pytest.approx([by_hand("abc", " def"), by_hand("abc", " gh")], rel=1e-4)
    assert scores[1] == pytest.approx([by_hand("The end", choice) for choice in (" xyz", " w", " !!")], rel=1e-4)


def test_predicted_choice_has_the_highest_raw_or_normalized_score() -> None:
    questions = [Question("?", ("yes", "no way at all"), 0), Question("?", ("yes", "no way at all"), 1)]
    plain, a_byte = choice_rows(questions, [[-3.0, -6.5], [-3.0, -6.5]], "final", "cpu")
    assert (plain.metric, plain.raw, plain.value) == ("choice_accuracy", (1.0, 0.0), 0.5)
    # 3 nats over 3 bytes are more than 6.5 over 13.
    assert (a_byte.metric, a_byte.raw, a_byte.value) == ("choice_accuracy_normalized", (0.0, 1.0), 0.5)


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_correct_choice_is_given_by_index_or_text(tmp_path: Path) -> None:
    row = {"prompt": "2 + 2 =", "choices": ["3", "4"]}
    path = write(tmp_path, {**row, "answer": 1}, {**row, "answer": "3"})
    assert [question.answer for question in read_questions(path)] == [1, 0]
    assert find_questions("questions.jsonl", tmp_path, SilentProgress()) == read_questions(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": " "}, "prompt is not text"),
        ({"choices": ["a"]}, "The choices are"),
        ({"choices": ["a", ""]}, "The choices are"),
        ({"choices": ["a", "a"]}, "occurs twice"),
        ({"answer": 2}, "The answer is 2"),
        ({"answer": True}, "The answer is True"),
        ({"answer": None}, "The answer is None"),
    ],
)
def test_invalid_row_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    good = {"prompt": "p", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(DataError, match=words) as caught:
        read_questions(write(tmp_path, good, {**good, **change}))
    assert caught.value.where == "questions.jsonl:2"


def test_file_without_columns_and_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no column 'choices'"):
        read_questions(write(tmp_path, {"prompt": "p", "answer": 0}))
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        find_questions("nowhere.jsonl", tmp_path, SilentProgress())


ASKED = [Instruction("say no", {"one_of": ["no"]}), Instruction("be brief", {"words_at_most": 3, "commas": 0})]


def answers(folder: Path) -> list[str]:
    return answer_instructions(folder, ASKED, 7, TARGETS["cpu"], 1, SilentProgress(), "")


def test_each_instruction_becomes_a_chat_turn_to_continue(tmp_path: Path) -> None:
    decoder, tokenizer = write_decoder(tmp_path, TEMPLATE), tiny_tokenizer()
    expected = []
    for text in ("u: say no;a:", "u: be brief;a:"):
        ids = decoder.continuation(tokenizer(text, add_special_tokens=False)["input_ids"], 7)
        expected.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert answers(tmp_path) == expected


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    write_decoder(tmp_path)
    with pytest.raises(DataError, match="asked as a chat, and the model's tokenizer has no chat template"):
        answers(tmp_path)


def test_accuracy_is_per_instruction_and_per_check() -> None:
    whole, checks = instruction_rows(ASKED, ["No.", "well, two"], "final", "cpu")
    assert (whole.metric, whole.raw, whole.value) == ("instructions_followed", (1.0, 0.0), 0.5)
    assert (checks.metric, checks.raw, checks.value) == ("checks_passed", (1.0, 1.0, 0.0), pytest.approx(2 / 3))
    assert whole.low is not None and whole.high is not None and whole.low < 0.5 < whole.high


def _read(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))))


def test_png_round_trip_preserves_pixel_values() -> None:
    gray = np.random.default_rng(0).integers(0, 256, (9, 7, 1), dtype=np.uint8)
    coloured = np.random.default_rng(1).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert (_read(encode_png(gray)) == gray[..., 0]).all()
    assert (_read(encode_png(coloured)) == coloured).all()


def test_large_image_is_downscaled_by_averaging() -> None:
    large = np.zeros((256, 512, 1), dtype=np.uint8)
    large[:, 256:] = 200
    small = _read(encode_png(large))
    assert small.shape == (64, 128)
    assert (small[:, :64] == 0).all() and (small[:, 64:] == 200).all()


def test_brighter_pixels_are_red_and_darker_are_blue() -> None:
    reference = np.full((1, 4, 1), 100, dtype=np.uint8)
    after = np.array([[[100], [132], [36], [255]]], dtype=np.uint8)  # 0, half, whole and more than whole of 64 levels
    half = round(255 / 2)
    expected = [[255, 255, 255], [255, half, half], [0, 0, 255], [255, 0, 0]]
    assert _read(encode_difference_png(after, reference)).tolist() == [expected]


def test_f1_of_a_slice_is_computed_on_its_rows() -> None:
    task = TASKS["token-classification"]
    expected = ["B-X O", "O B-Y", "B-X I-X", "O O"]
    predicted = ["B-X O", "B-X O", "B-X O", "B-Y O"]
    predictions = Predictions({"found": np.array(predicted), "wanted": np.array(expected)}, None)
    whole = task.measure(predictions.kept, None, "m", "t")
    rows = np.array([True, False, True, True])
    slices = {row.metric: row for row in task_slice_rows(task, predictions, whole, [Part("some", "", rows)])}
    sides = ([row.split() for row, is_in in zip(side, rows, strict=True) if is_in] for side in (expected, predicted))
    assert slices["f1[some]"].value == pytest.approx(f1_score(*sides))
    assert slices["f1[some]"].n == 3 and slices["f1[some]"].raw is None
    assert slices["exact_match[some]"].value == pytest.approx(1 / 3)
    assert set(slices) == {f"{name}[some]" for name in (*task.ratios, "exact_match")}


def test_task_without_ratios_reports_outcomes_by_slice() -> None:
    task = TASKS["text-classification"]
    predictions = Predictions(
        {"logits": np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], np.float32)}, np.array([0, 0, 0])
    )
    whole = task.measure(predictions.kept, predictions.labels, "m", "t")
    parts = [Part("some", "", np.array([True, True, False]))]
    assert task_slice_rows(task, predictions, whole, parts) == slice_rows(whole, parts)
