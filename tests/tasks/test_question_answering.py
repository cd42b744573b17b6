"""Tests of question answering: answer spans compared with transformers, metrics with SQuAD's definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_tasks import rows, write_model
from transformers import AutoModelForQuestionAnswering, AutoTokenizer
from transformers.pipelines.document_question_answering import select_starts_ends

from compress.data.columns import choose
from compress.data.files import Rows
from compress.tasks.inference import predict
from compress.tasks.question_answering import TASK
from compress.tasks.spans import MOST_TOKENS, best_span, exact, word_f1
from compress.utils.errors import DataError


def table(some: list[dict]) -> pa.Table:
    names = tuple(some[0])
    return choose(Rows("here", names, {name: [row[name] for row in some] for name in names}), TASK.columns, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_folder = tmp_path_factory.mktemp("answers")
    write_model(model_folder, TASK.name, is_decoder=False)
    return model_folder


def test_answers_equal_transformers_decoding(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    some = dict(rows(TASK.name))["train"]
    examples = TASK.encode(table(some), model.processor, None, 48)
    collected = TASK.collect({examples.answer: predict(model.module, examples)}, examples, range(len(examples)))
    tokenizer, module = AutoTokenizer.from_pretrained(folder), AutoModelForQuestionAnswering.from_pretrained(folder)
    for row, answer in zip(some, collected["answer"].tolist(), strict=True):
        encoded = tokenizer(row["question"], row["context"], return_offsets_mapping=True, return_tensors="pt")
        offsets = encoded.pop("offset_mapping")[0]
        with torch.no_grad():
            outputs = module.eval()(**encoded)
        outside = np.array([[part != 1 for part in encoded.sequence_ids(0)]]).astype(int)
        starts, ends, _, _ = select_starts_ends(
            outputs.start_logits.numpy(),
            outputs.end_logits.numpy(),
            outside,
            encoded["attention_mask"].numpy(),
            max_answer_len=MOST_TOKENS,
        )
        assert answer == row["context"][offsets[starts[0]][0] : offsets[ends[0]][1]]


def test_best_span_equals_brute_force() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        first, last = generator.normal(size=(2, 50))
        allowed = generator.random(50) < 0.7
        brute = max(
            (first[a] + last[b], a, b)
            for a in range(50)
            for b in range(a, min(a + MOST_TOKENS, 50))
            if allowed[a] and allowed[b]
        )
        at, to, score = best_span(first, last, allowed)
        assert (score, at, to) == pytest.approx(brute)


def test_long_context_is_split_into_windows(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    context = " ".join(["film"] * 60 + ["superb"] + ["plot"] * 9)
    short = {"question": "the film", "context": "the superb cast", "answers": "superb"}
    examples = TASK.encode(
        table([{"question": "the film", "context": context, "answers": "superb"}, short]), model.processor, None, 24
    )
    windows = [example for example in examples.inputs if example["row"] == 0]
    assert len(windows) == 5 and "6 windows of 2 contexts" in examples.note
    assert [int(example["row"]) for example in examples.inputs[:2]] == [0, 1], (
        "the first windows of all rows come first"
    )
    spans = [tuple(span) for span in examples.labels.tolist()]
    assert spans[1] == (5, 5)
    held = [index for index, span in enumerate(spans) if span != (0, 0) and index != 1]
    for index in held:
        starts, ends = examples.inputs[index]["offsets"]
        assert context[starts[spans[index][0]] : ends[spans[index][1]]] == "superb"
    assert held
    logits = np.zeros((len(examples), 2, 24), np.float32)
    for index, (first, last) in enumerate(spans):
        logits[index, 0, first] = logits[index, 1, last] = 9
    collected = TASK.collect({examples.answer: logits}, examples, range(len(examples)))
    values = {row.metric: row.value for row in TASK.measure(collected, None, "m", "t")}
    assert values == {"f1": 1.0, "exact_match": 1.0}


@pytest.mark.parametrize(
    ("answer", "reference", "f1"),
    [
        ("The Big Ben!", "big ben", 1.0),
        ("in London", "London", 2 / 3),
        ("a cat sat", "the cat sat down", 0.8),
        ("", "London", 0.0),
        ("", "", 1.0),
    ],
)
def test_word_f1_equals_squad_script(answer: str, reference: str, f1: float) -> None:
    assert word_f1(answer, reference) == pytest.approx(f1)
    assert exact(answer, reference) == (f1 == 1.0)


def test_empty_answer_is_allowed_if_some_question_has_none() -> None:
    collected = {
        "answer": np.array(["here", "there", "so"]),
        "score": np.array([1.0, 5.0, 2.0]),
        "nothing": np.array([3.0, 4.0, 1.0]),
        "row": np.array([0, 1, 2]),
        "gold": np.array(["[]", '["there"]', '["so"]']),
    }
    measured = {row.metric: row for row in TASK.measure(collected, None, "m", "t")}
    assert measured["exact_match"].raw == (1.0, 1.0, 1.0)
    collected["gold"][0] = '["here"]'
    assert TASK.measure(collected, None, "m", "t")[1].raw == (1.0, 1.0, 1.0), (
        "the empty answer is not allowed, since every question has an answer"
    )


def test_loss_is_mean_of_start_and_end_loss() -> None:
    start, end = torch.randn(2, 2, 6)
    labels = torch.tensor([[1, 2], [3, 5]])
    expected = -(start.log_softmax(1)[[0, 1], [1, 3]] + end.log_softmax(1)[[0, 1], [2, 5]]).mean() / 2
    outputs = type("Out", (), {"start_logits": start, "end_logits": end})
    torch.testing.assert_close(TASK.loss(outputs, labels), expected)


def test_padding_does_not_change_distillation_distance() -> None:
    mine, taught = torch.randn(2, 3, 2, 5)
    padded = [torch.cat([logits, torch.zeros(3, 2, 4)], dim=-1) for logits in (mine, taught)]
    torch.testing.assert_close(TASK.distance(*padded, 2.0), TASK.distance(mine, taught, 2.0))


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ("zebra", "'zebra' is not in its context"),
        ({"text": ["superb"], "answer_start": [0]}, "there stands 'the su'"),
        ({"text": ["superb"], "answer_start": [1, 2]}, "1 answers and 2 positions"),
        ({"text": [" "], "answer_start": [0]}, "blank"),
        (5, "value of type int"),
    ],
)
def test_answer_outside_context_is_reported(folder: Path, answers: object, says: str) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    with pytest.raises(DataError, match=says):
        row = {"question": "the film", "context": "the superb cast", "answers": answers}
        TASK.encode(table([row]), model.processor, None, 24)


def test_question_longer_than_window_is_reported(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    row = {"question": "film " * 30, "context": "the superb cast", "answers": "superb"}
    with pytest.raises(DataError, match="A question has 30 tokens, which leaves 0 of 24"):
        TASK.encode(table([row]), model.processor, None, 24)
