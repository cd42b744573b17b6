"""Tests of the comparison with TF-IDF of words: data that words decide, data that they cannot, and paired intervals."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from compress.data.dataset import Dataset
from compress.evaluation.word_baseline import compare_with_words, fit_word_baseline
from compress.results.report import Measurement
from compress.tasks.registry import TASKS

TASK = TASKS["text-classification"]
RNG = np.random.default_rng(0)
FILLERS = np.array([f"filler{number}" for number in range(30)])


def rows(count: int, decisive: bool) -> pa.Table:
    """Return texts of random words; with ``decisive``, one of them tells the label."""
    labels = RNG.choice(["bad", "good"], count)
    texts = [" ".join([*RNG.choice(FILLERS, 5), f"is{label}" if decisive else "is"]) for label in labels]
    return pa.table({"text": texts, "label": labels.tolist()})


def dataset(decisive: bool = True, train: int = 200, test: int = 100) -> Dataset:
    return Dataset(TASK.columns, {"train": rows(train, decisive), "test": rows(test, decisive)}, ("bad", "good"))


def accuracy(right: np.ndarray, model: str = "final") -> Measurement:
    return Measurement(
        model=model, metric="accuracy", target="cpu", value=right.mean(), unit="ratio", raw=tuple(right.astype(float))
    )


def test_words_that_decide_are_found_and_random_words_are_not() -> None:
    right, training_rows = fit_word_baseline(TASK, dataset())  # type: ignore[misc]
    assert right.all() and training_rows == 200
    right, _ = fit_word_baseline(TASK, dataset(decisive=False, test=1000))  # type: ignore[misc]
    assert right.mean() == pytest.approx(0.5, abs=0.06)


def test_order_of_words_counts() -> None:
    # Only pairs of words tell "not good" from "good not".
    texts = ["x not good y", "x good not y"] * 40
    table = pa.table({"text": texts, "label": ["bad", "good"] * 40})
    right, _ = fit_word_baseline(TASK, Dataset(TASK.columns, {"train": table, "test": table}, ("bad", "good")))  # type: ignore[misc]
    assert right.all()


def test_final_model_is_compared_on_the_same_rows() -> None:
    data = dataset(decisive=False, test=400)
    right, _ = fit_word_baseline(TASK, data)  # type: ignore[misc]
    better = right | (RNG.random(400) < 0.5)
    baseline = compare_with_words(TASK, data, [accuracy(right, "baseline"), accuracy(better)])
    assert baseline is not None
    assert baseline.accuracy == right.mean() and baseline.low < right.mean() < baseline.high
    differences = better.astype(float) - right
    assert baseline.difference == pytest.approx(differences.mean())
    spread = 1.96 * differences.std() / 20
    assert baseline.difference_low == pytest.approx(differences.mean() - spread, abs=0.01)
    assert baseline.difference_high == pytest.approx(differences.mean() + spread, abs=0.01)
    assert len(baseline.lines()) == 1
    equal = compare_with_words(TASK, data, [accuracy(right)])
    assert equal is not None and "not measurably better" in equal.lines()[1]


@pytest.mark.parametrize("kind", ["task", "classes", "words", "labels", "accuracy"])
def test_data_without_such_a_baseline_has_none(kind: str) -> None:
    data, task = dataset(), TASK
    measurements = [] if kind == "accuracy" else [accuracy(np.ones(100, dtype=bool))]
    if kind == "task":
        task = TASKS["token-classification"]
    elif kind == "classes":
        many = pa.table({"text": ["a word"] * 202, "label": [str(number // 2) for number in range(202)]})
        data = Dataset(TASK.columns, {**data.tables, "train": many}, ())
    elif kind == "words":
        empty = pa.table({"text": ["?", "!"], "label": ["bad", "good"]})
        data = Dataset(TASK.columns, {**data.tables, "train": empty}, ("bad", "good"))
    elif kind == "labels":
        data = Dataset(TASK.columns, {**data.tables, "train": data.tables["train"].select(["text"])}, ("bad", "good"))
    assert compare_with_words(task, data, measurements) is None
