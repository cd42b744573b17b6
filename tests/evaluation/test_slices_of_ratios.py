"""What a task says is a ratio is measured anew on each slice, and right or wrong outcomes are counted as before."""

from __future__ import annotations

import numpy as np
import pytest
from seqeval.metrics import f1_score

from compress.data.membership import Part
from compress.evaluation.evaluate import Predictions, slice_rows, task_slice_rows
from compress.tasks.registry import get_task


def test_f1_of_a_slice_is_that_of_its_rows() -> None:
    task = get_task("token-classification")
    expected = ["B-X O", "O B-Y", "B-X I-X", "O O"]
    predicted = ["B-X O", "B-X O", "B-X O", "B-Y O"]
    predictions = Predictions({"found": np.array(predicted), "wanted": np.array(expected)}, None)
    whole = task.measure(predictions.kept, None, "m", "t")
    rows = np.array([True, False, True, True])
    slices = {row.metric: row for row in task_slice_rows(task, predictions, whole, [Part("some", "", rows)])}
    sides = (
        [row.split() for row, selected in zip(side, rows, strict=True) if selected] for side in (expected, predicted)
    )
    assert slices["f1[some]"].value == pytest.approx(f1_score(*sides))
    assert slices["f1[some]"].n == 3 and slices["f1[some]"].raw is None
    assert slices["exact_match[some]"].value == pytest.approx(1 / 3)
    assert set(slices) == {f"{name}[some]" for name in (*task.ratios, "exact_match")}


def test_a_task_without_ratios_has_the_slices_of_its_outcomes() -> None:
    task = get_task("text-classification")
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]], np.float32)
    predictions = Predictions({"logits": logits}, np.array([0, 0, 0]))
    whole = task.measure(predictions.kept, predictions.labels, "m", "t")
    parts = [Part("some", "", np.array([True, True, False]))]
    assert task_slice_rows(task, predictions, whole, parts) == slice_rows(whole, parts)
