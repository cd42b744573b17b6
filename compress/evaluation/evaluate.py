"""Accuracy of an artifact, through the runtime that will run it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.data.membership import Part
from compress.formats.runtimes import get_runtime
from compress.formats.target_profile import Target
from compress.models.folder_checks import check_processor
from compress.models.json_file import read_json
from compress.models.processor import load_processor
from compress.numerics.ratio import linearized, ratio_interval
from compress.numerics.statistics import wilson_interval
from compress.results.measurement import Measurement
from compress.results.metrics import metric_on_slice
from compress.runtimes.decoder import feeder
from compress.tasks.batches import by_length, keep_all
from compress.tasks.evaluation import Evaluation
from compress.tasks.task import Examples, Kept, Task
from compress.utils.errors import ModelError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

    from compress.runtimes.runtime import Session

_SEED = 0
_FEWEST = 20
"""Tokens of a kind without which nothing is said of it."""


@dataclass(frozen=True)
class Predictions:
    """What a task keeps of an artifact's outputs for every example, and the examples' label ids [n], if any."""

    kept: Kept
    labels: np.ndarray | None


def artifact_labels(artifact: Path) -> tuple[str, ...] | None:
    """Class names from the artifact's config, in the order of their ids. Raises `ModelError` for a broken config."""
    names = read_json(artifact / "config.json").get("id2label")
    return None if names is None else tuple(names[key] for key in sorted(names, key=int))


def encode_for(
    artifact: Path,
    task: Task,
    rows: pa.Table,
    max_length: int,
    evaluation: Evaluation | None = None,
    baseline: Path | None = None,
) -> Examples:
    """What the artifact is judged by of ``rows``, encoded by the processor beside it, and compared with ``baseline``.

    Raises `ModelError` where that does not load, `DataError` for rows that it can't be judged by.
    """
    # Without its files, transformers would make an empty tokenizer and say nothing.
    check_processor(artifact, read_json(artifact / "config.json"))
    wanted = rows, load_processor(artifact), artifact_labels(artifact), max_length, evaluation or Evaluation()
    return (
        task.held_out(*wanted) if baseline is None else task.held_out_beside(*wanted, lambda: load_processor(baseline))
    )


def predict(
    artifact: Path, task: Task, examples: Examples, target: Target, threads: int, progress: Progress, description: str
) -> Predictions:
    """Run every example, batched by length, and keep what the task keeps. Raises what opening and running raise."""
    session = get_runtime(target.runtime).open(artifact, target, threads)
    feed = feeder(session, str(artifact))
    _check_outputs(session, examples, artifact)
    batches = by_length(examples, 1 if examples.whole else task.batch_size)
    tracked = progress.track(batches, description, len(batches))
    kept = keep_all(task, examples, tracked, lambda places: session.predict(feed(examples.batch(places))))
    return Predictions(kept, examples.labels)


def _check_outputs(session: Session, examples: Examples, artifact: Path) -> None:
    """Raises `ModelError` for a graph that lacks what the task's answers are made of."""
    given = session.output_types
    absent = [name for name in examples.outputs if name not in given]
    if any(kind.dtype == "str" for kind in given.values()):
        return  # two graphs that write text: the answer is there in words
    if absent and examples.answer not in given and given:
        raise ModelError(
            f"The model has no output {absent[0]!r}.",
            where=str(artifact),
            expected=f"{', '.join(examples.outputs)}, as transformers' exporters name it",
            hint=f"it has {', '.join(given)}; rename one, or leave `task` out to measure agreement alone",
        )


def slices_of_task(
    task: Task, found: Predictions, whole: Sequence[Measurement], parts: Sequence[Part]
) -> list[Measurement]:
    """`METRIC[NAME]` for each part: of outcomes of 0 and 1, and of what the task says are ratios, measured anew."""
    rows = slice_rows(whole, parts)
    for part in parts if task.ratios and whole else ():
        kept = {name: array[part.rows] for name, array in found.kept.items()}
        labels = None if found.labels is None else found.labels[part.rows]
        anew = task.measure(kept, labels, whole[0].model, whole[0].target)
        rows += [
            row.model_copy(update={"metric": metric_on_slice(row.metric, part.name), "raw": None})
            for row in anew
            if row.metric in task.ratios
        ]
    return rows


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
            rows.append(row.model_copy(update={"metric": metric_on_slice(row.metric, part.name), **changed}))
    return rows


def kind_rows(
    losses: np.ndarray, kinds: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray], whole: Measurement
) -> list[Measurement]:
    """`perplexity[KIND]` of ``losses`` [n, scored] for each kind of token, beside the ``whole`` text's.

    ``counts`` are the baseline's tokens of each kind in each window, [n], whatever a model's own are. The interval is
    over windows, and raw outcomes are what each adds to the logarithm, so that two models' can be paired.
    """
    rows = []
    for kind, tokens in counts.items():
        if kind not in kinds or tokens.sum() < _FEWEST or len(tokens) < 2:
            continue
        nats = np.where(kinds[kind], losses, 0.0).sum(axis=1, dtype=np.float64)
        bounds = {name: math.exp(value) for name, value in ratio_interval(nats, tokens, _SEED)._asdict().items()}
        raw = tuple(linearized(nats, tokens).tolist())
        named = {"metric": metric_on_slice(whole.metric, kind), "n": len(raw), "raw": raw}
        rows.append(whole.model_copy(update={**named, **bounds}))
    return rows


def share_row(metric: str, outcomes: Sequence[float], model: str, target: str) -> Measurement:
    """The share of ``outcomes`` that are 1 and not 0, with its Wilson interval."""
    n, raw = len(outcomes), tuple(outcomes)
    low, high = wilson_interval(int(sum(raw)), n)
    return Measurement(
        model=model, metric=metric, target=target, value=sum(raw) / n, unit="ratio", low=low, high=high, n=n, raw=raw
    )
