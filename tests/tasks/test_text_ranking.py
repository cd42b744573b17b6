"""Tests of text ranking: scores compared with transformers as in CrossEncoder, ranking metrics with values by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from tiny_tasks import rows, write_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from compress.data.columns import choose
from compress.data.files import Rows
from compress.recipe.loading import infer_task_of_reference
from compress.tasks.inference import predict
from compress.tasks.text_ranking import TASK, Relevance
from compress.utils.errors import DataError, ModelError


def table(some: list[dict]) -> pa.Table:
    names = tuple(some[0])
    return choose(Rows("here", names, {name: [row[name] for row in some] for name in names}), TASK.columns, {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model_folder = tmp_path_factory.mktemp("ranker")
    write_model(model_folder, TASK.name, num_labels=1)
    return model_folder


def test_scores_equal_transformers_on_text_pairs(folder: Path) -> None:
    model = TASK.load(folder, None, trust_remote_code=False)
    some = dict(rows(TASK.name))["train"]
    examples = TASK.encode(table(some), model.processor, None, 32)
    answers = predict(model.module, examples)
    tokenizer, module = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForSequenceClassification.from_pretrained(folder),
    )
    pairs = [[row["text"], row["pair"]] for row in some]
    # The same computation as in sentence_transformers.CrossEncoder.predict.
    with torch.no_grad():
        expected = module.eval()(**tokenizer(pairs, padding=True, truncation=True, return_tensors="pt")).logits[:, 0]
    np.testing.assert_allclose(answers[:, 1], expected.numpy(), atol=1e-5)
    assert not answers[:, 0].any()
    assert "token_type_ids" in examples.padding and examples.inputs[0]["token_type_ids"].any()


def test_two_outputs_are_unchanged() -> None:
    logits = torch.randn(3, 2)
    assert torch.equal(Relevance().read({"logits": logits}, {}), logits)


def test_ranking_metrics_match_values_by_hand() -> None:
    collected = {
        "scores": np.array([3.0, 2.0, 1.0, -1.0, 5.0, 0.5]),
        "relevance": np.array([0.0, 1.0, 0.0, 1.0, 0.0, 0.0]),
        "queries": np.array([0, 0, 0, 1, 1, 2]),
    }
    measured = {row.metric: row for row in TASK.measure(collected, None, "m", "t")}
    # The first two queries rank their relevant candidate second; the third has a single candidate.
    assert measured["mean_reciprocal_rank"].value == pytest.approx(0.5)
    assert measured["ndcg_at_10"].value == pytest.approx(1 / np.log2(3))
    assert measured["accuracy"].raw == (0.0, 1.0, 0.0, 0.0, 0.0, 0.0)


def test_equal_scores_rank_last() -> None:
    collected = {"scores": np.zeros(4), "relevance": np.array([1.0, 0, 0, 0]), "queries": np.zeros(4, int)}
    measured = {row.metric: row for row in TASK.measure(collected, None, "m", "t")}
    assert measured["mean_reciprocal_rank"].value == 0.25


def test_loss_covers_only_rows_with_relevance() -> None:
    outputs = type("Out", (), {"logits": torch.tensor([[2.0], [-1.0], [4.0]])})
    labels = torch.tensor([[1.0, 0], [0.0, 0], [-100.0, -100.0]])
    expected = -(torch.sigmoid(torch.tensor(2.0)).log() + torch.sigmoid(torch.tensor(1.0)).log()) / 2
    torch.testing.assert_close(TASK.loss(outputs, labels), expected)


@pytest.mark.parametrize("label", ["often", 2, -1])
def test_invalid_relevance_is_reported(label: object) -> None:
    with pytest.raises(DataError, match="relevance"):
        table([{"text": "a", "pair": "b", "label": label}])


def test_more_than_two_outputs_are_rejected(tmp_path: Path) -> None:
    write_model(tmp_path, TASK.name, num_labels=3)
    with pytest.raises(ModelError, match="3 outputs"):
        TASK.load(tmp_path, None, trust_remote_code=False)


def test_task_of_cross_encoder_is_inferred_from_config(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert infer_task_of_reference(str(folder), tmp_path)[0] == "text-classification"
    written = {**config, "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert infer_task_of_reference(str(tmp_path), tmp_path)[0] == "text-ranking"
