"""Evaluation of an artifact on a split, through the runtime of its target.

Evaluation runs the shipped file through the runtime of its target, never the model in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from compress.data.membership import Part
from compress.formats.generation.decoder import feeder
from compress.formats.runtime import get_runtime
from compress.formats.target_profile import Target
from compress.models.folder_checks import check_processor
from compress.models.json_file import labels_of_config, read_json
from compress.models.processor import load_processor
from compress.numerics.embeddings import normalized
from compress.numerics.statistics import linearized, ratio_interval, wilson_interval
from compress.results.metrics import metric_on_slice
from compress.results.report import Measurement
from compress.tasks.embeddings import EMBEDDING
from compress.tasks.evaluation import Evaluation
from compress.tasks.task import CollectedOutputs, Examples, Task
from compress.tasks.tokens import by_length, keep_all
from compress.utils.errors import ModelError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    import pyarrow as pa

    from compress.formats.runtime import Session

_SEED = 0
_FEWEST = 20
"""Smallest number of tokens of a kind that gets a measurement."""


@dataclass(frozen=True)
class Predictions:
    """Outputs of an artifact that the task keeps for every example, and the examples' label ids [n], if any."""

    kept: CollectedOutputs
    labels: np.ndarray | None


def artifact_labels(artifact: Path) -> tuple[str, ...] | None:
    """Return class names from the artifact's config, in the order of their ids, or None.

    Raises:
        ModelError: The config is broken.
    """
    return labels_of_config(read_json(artifact / "config.json"), artifact / "config.json")


def encode_for_model(
    artifact: Path,
    task: Task,
    rows: pa.Table,
    max_length: int,
    evaluation: Evaluation | None = None,
    baseline: Path | None = None,
) -> Examples:
    """Encode ``rows`` with the artifact's processor.

    Args:
        artifact: Model folder.
        task: Task of the model.
        rows: Rows of a split.
        max_length: Largest number of tokens of an example.
        evaluation: Evaluation settings of the recipe.
        baseline: Model folder of the baseline, if the artifact's outputs are compared with it.

    Raises:
        ModelError: The processor cannot be loaded.
        DataError: The rows are unsuitable for the model.
    """
    # Without its files, transformers would make an empty tokenizer and say nothing.
    check_processor(artifact, read_json(artifact / "config.json"))
    arguments = rows, load_processor(artifact), artifact_labels(artifact), max_length, evaluation or Evaluation()
    if baseline is None:
        return task.eval_examples(*arguments)
    return task.eval_examples_like(*arguments, lambda: load_processor(baseline))


def predict(
    artifact: Path, task: Task, examples: Examples, target: Target, threads: int, progress: Progress, description: str
) -> Predictions:
    """Run every example, batched by length, and return the outputs that the task keeps.

    Raises the errors of opening and running the model.

    Args:
        artifact: Model folder or file.
        task: Task of the model.
        examples: Encoded examples.
        target: Target that runs the model.
        threads: Number of threads.
        progress: Progress display.
        description: Text of the progress bar.
    """
    session = get_runtime(target.runtime).open(artifact, target, threads)
    feed = feeder(session, str(artifact))
    check_outputs(session, examples, artifact)
    batches = by_length(examples, 1 if examples.full_call else task.batch_size)
    tracked = progress.track(batches, description, len(batches))
    outputs = keep_all(task, examples, tracked, lambda indices: session.predict(feed(examples.batch(indices))))
    return Predictions(outputs, examples.labels)


def embed_texts(
    artifact: Path,
    task: Task,
    texts: Sequence[str],
    max_length: int,
    target: Target,
    threads: int,
    progress: Progress,
    description: str,
) -> np.ndarray:
    """Return normalized embeddings of texts [n, d]. Raises the errors of opening and running the model.

    Args:
        artifact: Model folder or file.
        task: Task of the model.
        texts: Texts to embed.
        max_length: Largest number of tokens of a text.
        target: Target that runs the model.
        threads: Number of threads.
        progress: Progress display.
        description: Text of the progress bar.
    """
    import pyarrow as pa

    examples = task.encode(pa.table({"text": list(texts)}), load_processor(artifact), None, max_length)
    outputs = predict(artifact, task, examples, target, threads, progress, description).kept
    return normalized(outputs[EMBEDDING])


def open_reader(artifact: Path, target: Target, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    """Open a language model and return a function from token ids [length] to their logits [length, vocabulary].

    Raises the errors of opening the model. The function raises those of running it.
    """
    return logits_reader(get_runtime(target.runtime).open(artifact, target, threads), str(artifact))


def logits_reader(session: Session, where: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function from token ids [length] to their logits [length, vocabulary]; ``where`` names the model."""
    feed = feeder(session, where)

    def read(ids: np.ndarray) -> np.ndarray:
        batch = {"input_ids": ids[None], "attention_mask": np.ones_like(ids)[None]}
        logits: np.ndarray = session.predict(feed(batch))["logits"][0]
        if len(logits) != len(ids):
            raise ModelError("The model returns logits of the last token only.", where=where)
        return logits

    return read


def check_outputs(session: Session, examples: Examples, artifact: Path) -> None:
    """Raise `ModelError` for a graph that lacks the outputs of the task."""
    output_types = session.output_types
    missing = [name for name in examples.outputs if name not in output_types]
    # Two graphs that write text have the answer in words.
    if any(output_type.dtype == "str" for output_type in output_types.values()):
        return
    if missing and examples.answer not in output_types and output_types:
        raise ModelError(
            f"The model has no output {missing[0]!r}.",
            where=str(artifact),
            expected=f"{', '.join(examples.outputs)}, as transformers' exporters name it",
            hint=f"it has {', '.join(output_types)}; rename one, or leave `task` out to measure agreement alone",
        )


def task_slice_rows(
    task: Task, predictions: Predictions, whole: Sequence[Measurement], parts: Sequence[Part]
) -> list[Measurement]:
    """Return `METRIC[NAME]` for each slice: of outcomes of 0 and 1, and of the task's ratios, computed again.

    Args:
        task: Task of the model.
        predictions: Outputs for all examples.
        whole: Measurements on all examples.
        parts: Slices of the split.
    """
    rows = slice_rows(whole, parts)
    for part in parts if task.ratios and whole else ():
        outputs = {name: array[part.rows] for name, array in predictions.kept.items()}
        labels = None if predictions.labels is None else predictions.labels[part.rows]
        for row in task.measure(outputs, labels, whole[0].model, whole[0].target):
            if row.metric in task.ratios:
                name = metric_on_slice(row.metric, part.name)
                rows.append(row.model_copy(update={"metric": name, "raw": None}))
    return rows


def slice_rows(whole: Iterable[Measurement], parts: Sequence[Part]) -> list[Measurement]:
    """Return `METRIC[NAME]` for each slice, with its Wilson interval, of each measurement with outcomes of 0 and 1."""
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


def token_kind_rows(
    losses: np.ndarray, kinds: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray], whole: Measurement
) -> list[Measurement]:
    """Return `perplexity[KIND]` for each kind of token.

    The interval is over sequences. Raw samples are the contributions of sequences to the logarithm, so that two models
    can be paired.

    Args:
        losses: Loss of each scored token, [n, scored].
        kinds: Kind -> whether a token is of that kind, [n, scored].
        counts: Kind -> number of such tokens in each sequence by the baseline's tokenizer, [n].
        whole: Measurement of all tokens.
    """
    rows = []
    for kind, tokens in counts.items():
        if kind not in kinds or tokens.sum() < _FEWEST or len(tokens) < 2:
            continue
        nats = np.where(kinds[kind], losses, 0.0).sum(axis=1, dtype=np.float64)
        bounds = {name: math.exp(value) for name, value in ratio_interval(nats, tokens, _SEED)._asdict().items()}
        raw = tuple(linearized(nats, tokens).tolist())
        fields = {"metric": metric_on_slice(whole.metric, kind), "n": len(raw), "raw": raw}
        rows.append(whole.model_copy(update={**fields, **bounds}))
    return rows


def share_row(metric: str, outcomes: Sequence[float], model: str, target: str) -> Measurement:
    """Return the share of ``outcomes`` that are 1 and not 0, with its Wilson interval."""
    n, raw = len(outcomes), tuple(outcomes)
    low, high = wilson_interval(int(sum(raw)), n)
    return Measurement(
        model=model, metric=metric, target=target, value=sum(raw) / n, unit="ratio", low=low, high=high, n=n, raw=raw
    )
