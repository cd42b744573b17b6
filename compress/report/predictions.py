"""`predictions.parquet` of a run: what every measured model answered to every row of the test split."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from compress.report.run_folder import write_whole
from compress.utils.errors import InputError

PREDICTIONS = "predictions.parquet"


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of a model to the rows of a split, each with its probability [n] and whether it is right [n]."""

    answers: Sequence[str]
    probability: np.ndarray
    correct: np.ndarray


@dataclass(frozen=True, eq=False)
class Found:
    """The file as it was read: the label of each row, and a model's answers."""

    labels: Sequence[str]
    answers: Answers


def column_prefix(model: str, target: str, several: bool) -> str:
    """What a model's columns begin with: its label, after the target if the run measured on several."""
    return f"{target}.{model}" if several else model


def write_predictions(
    labels: Sequence[str], answers: Mapping[tuple[str, str], Answers], folder: Path, several: bool
) -> None:
    """Write the file whole or not at all: `row`, `label`, and `MODEL.answer`, `.probability` and `.correct`.

    ``answers`` has them by (model, target); with ``several`` targets the columns are `TARGET.MODEL.answer` and so
    on. Raises `StorageError`.
    """
    columns: dict[str, pa.Array] = {
        "row": pa.array(np.arange(len(labels), dtype=np.int32)),
        "label": pa.array(labels, pa.string()).dictionary_encode(),
    }
    for (model, target), found in answers.items():
        prefix = column_prefix(model, target, several)
        columns[f"{prefix}.answer"] = pa.array(found.answers, pa.string()).dictionary_encode()
        columns[f"{prefix}.probability"] = pa.array(found.probability.astype(np.float32))
        columns[f"{prefix}.correct"] = pa.array(found.correct.astype(bool))
    content = io.BytesIO()
    pyarrow.parquet.write_table(pa.table(columns), content)
    write_whole(folder / PREDICTIONS, content.getvalue(), "table of predictions")


def read_predictions(folder: Path, model: str, target: str) -> Found:
    """What ``model`` answered in the run of ``folder``. Raises `InputError` where that is not to be had."""
    path = folder / PREDICTIONS
    try:
        names = pyarrow.parquet.read_schema(path).names
        prefixes = [column_prefix(model, target, several) for several in (True, False)]
        prefix = next((one for one in prefixes if f"{one}.answer" in names), None)
        if prefix is None:
            raise InputError(f"{PREDICTIONS} has no answers of {model} on {target}.", where=str(path))
        wanted = ["label", *(f"{prefix}.{part}" for part in ("answer", "probability", "correct"))]
        table = pyarrow.parquet.read_table(path, columns=wanted)
        columns = {name: table[name].to_pylist() for name in wanted}
    except FileNotFoundError:
        raise InputError(f"There is no {PREDICTIONS}.", where=str(folder), expected="a folder of a run") from None
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(f"{PREDICTIONS} cannot be read: {error}", where=str(path)) from None
    answers = Answers(
        columns[f"{prefix}.answer"],
        np.array(columns[f"{prefix}.probability"], dtype=np.float64),
        np.array(columns[f"{prefix}.correct"], dtype=bool),
    )
    return Found(columns["label"], answers)
