"""`predictions.parquet` of a run: the answer of every measured model to every row of the test split."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from compress.report.run_folder import write_atomically
from compress.utils.errors import InputError

PREDICTIONS = "predictions.parquet"


@dataclass(frozen=True, eq=False)
class ModelAnswers:
    """Answers of a model to the rows of a split, with their probabilities [n] and correctness [n]."""

    answers: Sequence[str]
    probability: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True, eq=False)
class StoredPredictions:
    """Label of each row, and one model's answers, as read from the file."""

    labels: Sequence[str]
    answers: ModelAnswers


def column_prefix(model: str, target: str, several: bool) -> str:
    """Return the prefix of a model's columns: its label, after the target if the run measured on several."""
    return f"{target}.{model}" if several else model


def write_predictions(
    labels: Sequence[str], answers: Mapping[tuple[str, str], ModelAnswers], folder: Path, several: bool
) -> None:
    """Write the file atomically: `row`, `label`, and `MODEL.answer`, `.probability` and `.correct`.

    Args:
        labels: Label of each row.
        answers: Answers by (model, target).
        folder: Folder of the run.
        several: Whether there are several targets. Columns are then `TARGET.MODEL.answer` and so on.

    Raises:
        StorageError: The file cannot be written.
    """
    columns: dict[str, pa.Array] = {
        "row": pa.array(np.arange(len(labels), dtype=np.int32)),
        "label": pa.array(labels, pa.string()).dictionary_encode(),
    }
    for (model, target), model_answers in answers.items():
        prefix = column_prefix(model, target, several)
        columns[f"{prefix}.answer"] = pa.array(model_answers.answers, pa.string()).dictionary_encode()
        columns[f"{prefix}.probability"] = pa.array(model_answers.probability.astype(np.float32))
        columns[f"{prefix}.correct"] = pa.array(model_answers.correct.astype(bool))
    content = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), content)
    write_atomically(folder / PREDICTIONS, content.getvalue(), "table of predictions")


def read_predictions(folder: Path, model: str, target: str) -> StoredPredictions:
    """Return the answers of ``model`` in the run of ``folder``. Raises `InputError` if they are unavailable."""
    path = folder / PREDICTIONS
    try:
        names = pyarrow.parquet.read_schema(path).names
        prefixes = [column_prefix(model, target, several) for several in (True, False)]
        prefix = next((candidate for candidate in prefixes if f"{candidate}.answer" in names), None)
        if prefix is None:
            raise InputError(f"{PREDICTIONS} has no answers of {model} on {target}.", where=str(path))
        selected = ["label", *(f"{prefix}.{part}" for part in ("answer", "probability", "correct"))]
        table = pyarrow.parquet.read_table(path, columns=selected)
        columns = {name: table[name].to_pylist() for name in selected}
    except FileNotFoundError:
        raise InputError(f"There is no {PREDICTIONS}.", where=str(folder), expected="a folder of a run") from None
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(f"{PREDICTIONS} cannot be read: {error}", where=str(path)) from None
    answers = ModelAnswers(
        columns[f"{prefix}.answer"],
        np.array(columns[f"{prefix}.probability"], dtype=np.float64),
        np.array(columns[f"{prefix}.correct"], dtype=bool),
    )
    return StoredPredictions(columns["label"], answers)
