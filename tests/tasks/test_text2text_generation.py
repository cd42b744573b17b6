"""Tests of text-to-text generation: loss and texts compared with transformers, metrics with reference libraries."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu, corpus_chrf
from tiny_text_to_text import pairs, save_tiny_bart
from transformers import AutoModelForSeq2SeqLM

from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.tasks.evaluation import Evaluation
from compress.tasks.inference import forward as forwarded
from compress.tasks.inference import merit, tensors
from compress.tasks.text2text_generation import TASK
from compress.utils.errors import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bart(tmp_path_factory.mktemp("bart"))


def test_loss_equals_transformers(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    examples = TASK.encode(pairs(8), model.processor, None, 32)
    batch = tensors(examples, list(range(8)))
    with torch.inference_mode():
        loss = TASK.loss(forwarded(model.module, batch), batch["labels"])
        plain = AutoModelForSeq2SeqLM.from_pretrained(folder)
        expected_loss = plain(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"].long()
        ).loss
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)


def test_merit_is_next_token_accuracy(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    examples = TASK.encode(pairs(12), model.processor, None, 32)
    right = []
    for row in range(12):
        batch = tensors(examples, [row])
        with torch.inference_mode():
            tokens = forwarded(model.module, batch).logits[0].argmax(-1)
        expected_tokens = batch["labels"][0][batch["labels"][0] != -100]
        right.append(float((tokens[: len(expected_tokens)] == expected_tokens).float().mean()))
    assert merit(TASK, model.module, examples) == pytest.approx(np.mean(right), abs=1e-6)


def test_metrics_equal_sacrebleu_and_rouge_score() -> None:
    references = ["and the king went up to his house", "lo, he spake unto them", "the end"]
    written = ["and the king went to his house", "lo he spake to them all", "the end"]
    rows = {row.metric: row for row in TASK.measure({"texts": np.array(written)}, np.array(references), "m", "t")}
    assert rows["bleu"].value == pytest.approx(corpus_bleu(written, [references]).score / 100)
    assert rows["chrf"].value == pytest.approx(corpus_chrf(written, [references]).score / 100)
    assert rows["chrf"].low <= rows["chrf"].value <= rows["chrf"].high
    scorer = RougeScorer(["rougeL"])
    overlap = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(references, written, strict=True)]
    assert rows["rouge_l"].value == pytest.approx(np.mean(overlap))
    assert rows["exact_match"].raw == (0.0, 0.0, 1.0)


def test_rows_without_targets_are_rejected(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    examples = TASK.eval_examples(pairs(2).select(["text"]), model.processor, None, 32, Evaluation())
    with pytest.raises(DataError, match="no targets"):
        TASK.collect({"texts": np.array(["a", "b"])}, examples, [0, 1])


def test_torch_runtime_equals_generate(folder: Path) -> None:
    session = get_runtime("torch").open(folder, TARGETS["torch"], 1)
    model = TASK.load(folder, None, trust_remote_code=False)
    examples = TASK.eval_examples(pairs(4), model.processor, None, 32, Evaluation())
    predicted = session.predict(examples.batch([0]))
    with torch.inference_mode():
        generated = model.module.generate(torch.from_numpy(examples.inputs[0]["input_ids"][None]))
    assert predicted["texts"].tolist() == model.processor.batch_decode(generated, skip_special_tokens=True)
    assert TASK.collect(predicted, examples, [0])["texts"].tolist() == predicted["texts"].tolist()
