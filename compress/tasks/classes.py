"""Shared functions of tasks with classes: labels, loss and metrics. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from compress.numerics.calibration import brier_scores, calibration_error_interval, mean_interval, softmax
from compress.numerics.statistics import linearized, ratio_interval, wilson_interval
from compress.results.report import Measurement
from compress.tasks.task import CollectedOutputs, Examples
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_IGNORED = -100
_LOGITS = "logits"
_SEED = 0
"""Seed of the bootstrap, so that equal answers give equal intervals."""


def set_labels(config: PretrainedConfig, labels: Sequence[str], has_head: bool) -> None:
    """Set the class names of ``config``. Raises `DataError` if a trained head lacks a label."""
    model_labels = [config.id2label[index] for index in sorted(config.id2label)]
    generic = all(name.startswith("LABEL_") for name in model_labels)
    if has_head and not generic:
        missing = [label for label in labels if label not in model_labels]
        if missing:
            raise DataError(
                f"The data has the label {missing[0]!r}, which the model lacks.",
                expected=f"labels among {', '.join(model_labels)}",
                hint=f"say what the numbers stand for, in their order: data.labels: [{', '.join(model_labels)}]"
                if all(map(str.isdecimal, labels))
                else "rename the labels, or start from a model without a classification head",
            )
        return
    if has_head and len(model_labels) != len(labels):
        raise DataError(f"The data has {len(labels)} labels; the model's head has {len(model_labels)}.")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def label_ids(names: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Return the indices of ``names`` in ``labels``, [n] int64. Raises `DataError` for an unknown name."""
    ids = {label: index for index, label in enumerate(labels)}
    unknown = next((name for name in names if name not in ids), None)
    if unknown is not None:
        raise DataError(f"The label {unknown!r} is unknown.", expected=f"one of {', '.join(labels)}")
    return np.array([ids[name] for name in names], dtype=np.int64)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss over the rows of logits [n, classes] that have a label (not -100)."""
    import torch

    if not bool((labels != _IGNORED).any()):
        return logits.sum() * 0.0
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED)


def keep_logits(outputs: Mapping[str, np.ndarray], examples: Examples) -> CollectedOutputs:
    """Return the logits, [batch, classes]. Raises `DataError` for examples without labels."""
    if examples.labels is None:
        raise DataError("The split has no labels, so nothing can be evaluated on it.", expected="a label column")
    return {_LOGITS: outputs[_LOGITS]}


def class_rows(collected: CollectedOutputs, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
    """Return accuracy with its Wilson interval, macro F1, calibration error and Brier score.

    Args:
        collected: Collected logits [n, classes].
        labels: Class ids [n].
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    assert labels is not None, "keep asks for labels"
    predicted = collected[_LOGITS].argmax(axis=-1)
    f1 = macro_f1(predicted, labels)
    return [
        outcome_row("accuracy", predicted == labels, model, target),
        Measurement(model=model, metric="f1", target=target, value=f1, unit="ratio", n=len(labels)),
        *_calibration(collected, labels, model, target),
    ]


def outcome_row(metric: str, right: np.ndarray, model: str, target: str) -> Measurement:
    """Return the share of correct rows with its Wilson interval and the outcome of each row.

    Args:
        metric: Name of the metric.
        right: Outcome of each row, [n] bool.
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    low, high = wilson_interval(int(right.sum()), len(right))
    return Measurement(
        model=model,
        metric=metric,
        target=target,
        value=float(right.mean()),
        unit="ratio",
        low=low,
        high=high,
        n=len(right),
        raw=tuple(float(outcome) for outcome in right),
    )


def agreement_row(same: np.ndarray, model: str, target: str) -> Measurement:
    """Return the share of examples [n] that are answered like the baseline, with its Wilson interval."""
    count = int(same.sum())
    low, high = wilson_interval(count, len(same))
    share = count / len(same)
    return Measurement(
        model=model, metric="agreement", target=target, value=share, unit="ratio", low=low, high=high, n=len(same)
    )


def mean_row(metric: str, samples: np.ndarray, model: str, target: str) -> Measurement:
    """Return the mean of ``samples`` with its bootstrap interval and all samples.

    Args:
        metric: Name of the metric.
        samples: One value per row, [n].
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    value, low, high = mean_interval(samples, _SEED)
    raw = tuple(samples.tolist())
    return Measurement(
        model=model, metric=metric, target=target, value=value, unit="ratio", low=low, high=high, n=len(raw), raw=raw
    )


def ratio_row(
    metric: str, parts: np.ndarray, wholes: np.ndarray, model: str, target: str, unit: str = "ratio"
) -> Measurement:
    """Return the ratio of two sums with its bootstrap interval over rows, or 0 without an interval for an empty sum.

    Args:
        metric: Name of the metric.
        parts: Numerators of the rows, [n].
        wholes: Denominators of the rows, [n].
        model: Name of the model in the report.
        target: Name of the target in the report.
        unit: Unit of the metric.
    """
    if not wholes.sum():
        return Measurement(model=model, metric=metric, target=target, value=0.0, unit=unit, n=max(len(parts), 1))
    return Measurement(
        model=model,
        metric=metric,
        target=target,
        unit=unit,
        n=len(parts),
        raw=tuple(linearized(parts, wholes).tolist()),
        **ratio_interval(parts, wholes, _SEED)._asdict(),
    )


def _calibration(collected: CollectedOutputs, labels: np.ndarray, model: str, target: str) -> list[Measurement]:
    probabilities = class_probabilities(collected)
    right = probabilities.argmax(axis=-1) == labels
    rows = {
        "calibration_error": (calibration_error_interval(probabilities.max(axis=-1), right, _SEED), "ratio"),
        "brier_score": (mean_interval(brier_scores(probabilities, labels), _SEED), ""),
    }
    return [
        Measurement(model=model, metric=name, target=target, unit=unit, n=len(labels), **interval._asdict())
        for name, (interval, unit) in rows.items()
    ]


def class_probabilities(collected: CollectedOutputs) -> np.ndarray:
    """Return the softmax of logits [n, classes]. Raises `ModelError` if they are not finite."""
    outputs = collected[_LOGITS]
    try:
        return softmax(outputs)
    except ValueError as error:
        wrong = int((~np.isfinite(outputs)).any(axis=-1).sum())
        raise ModelError(
            f"The model's outputs are not finite for {wrong} of {len(outputs)} examples.",
            expected="finite logits",
            hint="export or quantize it anew; float16 overflows where float32 does not",
        ) from error


def same_class(collected: CollectedOutputs, reference: CollectedOutputs, model: str, target: str) -> list[Measurement]:
    """Return the share of examples for which both models choose the same class.

    Args:
        collected: Collected outputs of the model.
        reference: Collected outputs of the baseline.
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    same = collected[_LOGITS].argmax(axis=-1) == reference[_LOGITS].argmax(axis=-1)
    return [agreement_row(same, model, target)]


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Return the unweighted mean of 2 TP / (2 TP + FP + FN) over the classes that occur on either side."""
    scores = []
    for label in np.union1d(predicted, labels):
        true_positives = np.sum((predicted == label) & (labels == label))
        errors = np.sum((predicted == label) != (labels == label))
        scores.append(2 * true_positives / (2 * true_positives + errors))
    return float(np.mean(scores))
