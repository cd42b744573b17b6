"""Accuracy of an artifact, through the runtime that will run it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.data.membership import Part
from compress.errors import DataError, ModelError
from compress.measurement import Measurement
from compress.models.checks import check_processor, read_json
from compress.numerics.statistics import wilson_interval
from compress.progress import Progress
from compress.report.metrics import slice_metric
from compress.runtimes import get_runtime
from compress.targets import Target
from compress.tasks.task import Examples, Task

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 32


@dataclass(frozen=True)
class Predictions:
    """Outputs [n, ...] of an artifact for every row of a split, and the rows' label ids [n]."""

    outputs: np.ndarray
    labels: np.ndarray


def artifact_labels(artifact: Path) -> tuple[str, ...] | None:
    """Class names from the artifact's config, in the order of their ids. Raises `ModelError` for a broken config."""
    names = read_json(artifact / "config.json").get("id2label")
    return None if names is None else tuple(names[key] for key in sorted(names, key=int))


def encode_for(artifact: Path, task: Task, rows: pa.Table, max_length: int) -> Examples:
    """``rows`` as inputs of the artifact, by the processor beside it. Raises `ModelError` where that does not load."""
    from transformers import AutoTokenizer

    # Without its files, transformers would make an empty tokenizer and say nothing.
    check_processor(artifact, read_json(artifact / "config.json"))
    try:
        processor: Any = AutoTokenizer.from_pretrained(artifact)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The artifact's tokenizer cannot be loaded: {error}", where=str(artifact)) from error
    return task.encode(rows, processor, artifact_labels(artifact), max_length)


def predict(
    artifact: Path, examples: Examples, target: Target, threads: int, progress: Progress, description: str
) -> Predictions:
    """Run every example, batched by length. Raises `DataError` for a split without labels, or what opening raises."""
    session = get_runtime(target.runtime).open(artifact, target, threads)
    if examples.labels is None:
        raise DataError("The split has no labels, so nothing can be evaluated on it.", expected="a label column")
    order = np.argsort(examples.lengths(), kind="stable")
    starts = range(0, len(order), _BATCH)
    parts = []
    for start in progress.track(starts, description, len(starts)):
        parts.append(session.predict(examples.batch(order[start : start + _BATCH].tolist()))["logits"])
    stacked = np.concatenate(parts)
    outputs = np.empty_like(stacked)
    outputs[order] = stacked
    return Predictions(outputs, examples.labels)


def agreement(task: Task, own: np.ndarray, reference: np.ndarray, model: str, target: str) -> Measurement:
    """The share of examples on which two models give the same answer, with its Wilson interval."""
    same: Sequence[bool] = task.same_answer(own, reference).tolist()
    low, high = wilson_interval(sum(same), len(same))
    return Measurement(
        model=model,
        metric="agreement",
        target=target,
        value=sum(same) / len(same),
        unit="ratio",
        low=low,
        high=high,
        n=len(same),
    )


def slice_rows(whole: Iterable[Measurement], parts: Sequence[Part]) -> list[Measurement]:
    """`METRIC[NAME]` for each part, with its Wilson interval, of every row that keeps outcomes of 0 and 1."""
    rows = []
    for row in whole:
        if row.raw is None or set(row.raw) - {0.0, 1.0}:
            continue
        outcomes = np.array(row.raw)
        for part in parts:
            right, n = int(outcomes[part.rows].sum()), int(part.rows.sum())
            low, high = wilson_interval(right, n)
            changed = {"value": right / n, "low": low, "high": high, "n": n, "raw": None}
            rows.append(row.model_copy(update={"metric": slice_metric(row.metric, part.name), **changed}))
    return rows
