"""Tests of fill-mask: reproducible masking, predictions compared with transformers' pipeline, metrics over tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_tasks import rows, write_model
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline

from compress.tasks.fill_mask import TASK, MaskedLogits
from compress.tasks.inference import merit, predict
from compress.utils.errors import DataError, ModelError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_folder = tmp_path_factory.mktemp("masked")
    write_model(model_folder, TASK.name, is_decoder=False)
    return model_folder


def table(count: int = 60) -> pa.Table:
    return pa.table({"text": [row["text"] for row in dict(rows(TASK.name))["train"]][:count]})


def test_predictions_equal_transformers_pipeline(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    examples = TASK.encode(table(), model.processor, None, 32)
    collected = TASK.collect({examples.answer: predict(model.module, examples)}, examples, range(len(examples)))
    unmasker = pipeline(
        "fill-mask",
        model=AutoModelForMaskedLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        top_k=len(model.processor),
    )
    for index, example in enumerate(examples.inputs):
        (mask_position,) = np.flatnonzero(example["input_ids"] == model.processor.mask_token_id)
        answers = unmasker(model.processor.decode(example["input_ids"][1:-1]))
        masked_token = examples.labels[index, mask_position]
        rank = next(at for at, answer in enumerate(answers, 1) if answer["token"] == masked_token)
        assert collected["rank"][index, 0] == rank and collected["first"][index, 0] == answers[0]["token"]
        assert collected["loss"][index, 0] == pytest.approx(-np.log(answers[rank - 1]["score"]), abs=1e-4)


def test_masking_is_reproducible(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    once, again = (TASK.encode(table(40).slice(0, n), model.processor, None, 32) for n in (40, 20))
    for example, other in zip(once.inputs[:20], again.inputs, strict=True):
        assert example["input_ids"].tolist() == other["input_ids"].tolist()
    assert (once.labels != -100).sum() == sum(max(1, round(0.15 * (len(x["input_ids"]) - 2))) for x in once.inputs)
    assert len({tuple(np.flatnonzero(row != -100)) for row in once.labels}) > 3, "masked positions differ between texts"


def test_loss_covers_only_masked_tokens() -> None:
    logits = torch.randn(2, 4, 7)
    labels = torch.full((2, 6), -100)
    labels[0, 1], labels[1, 3] = 5, 2
    expected = -(logits[0, 1].log_softmax(0)[5] + logits[1, 3].log_softmax(0)[2]) / 2
    torch.testing.assert_close(TASK.loss(type("Out", (), {"logits": logits}), labels), expected)


def test_outputs_are_logits_of_masked_tokens_in_order() -> None:
    ids = torch.tensor([[2, 9, 4, 9, 9], [2, 3, 9, 0, 0]])
    logits = torch.randn(2, 5, 11)
    masked_logits = MaskedLogits(9).read({"logits": logits}, {"input_ids": ids})
    assert torch.equal(masked_logits[0], logits[0, [1, 3, 4]])
    assert torch.equal(masked_logits[1, 0], logits[1, 2]) and not masked_logits[1, 1:].any()


def test_metrics_are_means_over_tokens() -> None:
    rank = np.array([[1, 3, 9], [1, -1, -1]])
    loss = np.where(rank < 0, np.nan, 0.5 * rank)
    measured = {row.metric: row for row in TASK.measure({"rank": rank, "loss": loss, "first": rank}, None, "m", "t")}
    assert measured["top_1_accuracy"].value == 0.5 and measured["top_5_accuracy"].value == 0.75
    assert measured["loss"].value == pytest.approx((0.5 + 1.5 + 4.5 + 0.5) / 4)


def test_merit_does_not_depend_on_batch_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    examples = TASK.encode(table(), model.processor, None, 32)
    whole = merit(TASK, model.module, examples)
    monkeypatch.setattr("compress.tasks.inference._JUDGED_AT_ONCE", 7)
    assert merit(TASK, model.module, examples) == whole


def test_masked_text_and_tokenizer_without_mask_are_rejected(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    with pytest.raises(DataError, match=r"has \[MASK\] in it"):
        TASK.encode(pa.table({"text": ["the [MASK] was great"]}), model.processor, None, 32)
    model.processor.mask_token = None
    with pytest.raises(ModelError, match="no mask"):
        TASK.encode(table(), model.processor, None, 32)
