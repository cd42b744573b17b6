"""Tests of `predictions.parquet`: written predictions are read back, and missing ones are an error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from compress.report.run_folder import ModelAnswers, read_predictions, write_predictions
from compress.utils.errors import InputError

LABELS = ("bad", "good", "good")
FIRST = ModelAnswers(("bad", "bad", "good"), np.array([0.75, 0.5, 1.0]), np.array([True, False, True]))
SECOND = ModelAnswers(("good", "good", "good"), np.array([0.5, 0.625, 0.875]), np.array([False, True, True]))


def test_columns_by_model(tmp_path: Path) -> None:
    write_predictions(LABELS, {("baseline", "cpu"): FIRST, ("final", "cpu"): SECOND}, tmp_path, several=False)
    table = pyarrow.parquet.read_table(tmp_path / "predictions.parquet")
    assert table.to_pylist()[1] == {
        "row": 1,
        "label": "good",
        "baseline.answer": "bad",
        "baseline.probability": 0.5,
        "baseline.correct": False,
        "final.answer": "good",
        "final.probability": 0.625,
        "final.correct": True,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.parquet"]


@pytest.mark.parametrize("several", [False, True])
def test_written_predictions_read_back(tmp_path: Path, several: bool) -> None:
    write_predictions(LABELS, {("final", "cpu"): FIRST, ("prune", "cpu"): SECOND}, tmp_path, several)
    stored = read_predictions(tmp_path, "prune", "cpu")
    assert stored.labels == list(LABELS)
    assert stored.answers.answers == list(SECOND.answers)
    assert stored.answers.probability.tolist() == SECOND.probability.tolist()
    assert stored.answers.correct.tolist() == SECOND.correct.tolist()


def test_missing_predictions_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"There is no predictions\.parquet"):
        read_predictions(tmp_path, "final", "cpu")
    write_predictions(LABELS, {("final", "cpu"): FIRST}, tmp_path, several=False)
    with pytest.raises(InputError, match="no predictions of prune on cpu"):
        read_predictions(tmp_path, "prune", "cpu")
    (tmp_path / "predictions.parquet").write_bytes(b"PAR1 and not much more")
    with pytest.raises(InputError, match="cannot be read"):
        read_predictions(tmp_path, "final", "cpu")
