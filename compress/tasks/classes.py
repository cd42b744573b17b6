"""What tasks share whose answer is one of several classes: labels, loss, metrics. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.numerics.calibration import brier_scores, calibration_error_interval, mean_interval, softmax
from compress.numerics.ratio import linearized, ratio_interval
from compress.numerics.statistics import wilson_interval
from compress.results.measurement import Measurement
from compress.tasks.task import Examples, Kept
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch

_IGNORED = -100
_LOGITS = "logits"
_SEED = 0
"""Of the bootstrap, so that the same answers give the same intervals."""


def set_labels(config: Any, labels: Sequence[str], has_head: bool) -> None:
    """Give ``config`` the data's class names. Raises `DataError` for labels that a trained head lacks."""
    known = [config.id2label[index] for index in sorted(config.id2label)]
    generic = all(name.startswith("LABEL_") for name in known)
    if has_head and not generic:
        missing = [label for label in labels if label not in known]
        if missing:
            raise DataError(
                f"The data has the label {missing[0]!r}, which the model lacks.",
                expected=f"labels among {', '.join(known)}",
                hint=f"say what the numbers stand for, in their order: data.labels: [{', '.join(known)}]"
                if all(map(str.isdecimal, labels))
                else "rename the labels, or start from a model without a classification head",
            )
        return
    if has_head and len(known) != len(labels):
        raise DataError(f"The data has {len(labels)} labels; the model's head has {len(known)}.")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def label_ids(names: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """The places of ``names`` in ``labels``, [n] int64. Raises `DataError` for one that is not there."""
    ids = {label: index for index, label in enumerate(labels)}
    unknown = next((name for name in names if name not in ids), None)
    if unknown is not None:
        raise DataError(f"The label {unknown!r} is unknown.", expected=f"one of {', '.join(labels)}")
    return np.array([ids[name] for name in names], dtype=np.int64)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean over the rows of logits [n, classes] that have a label; a label of -100 marks a row without."""
    import torch

    if not bool((labels != _IGNORED).any()):
        return logits.sum() * 0.0
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED)


def keep_logits(outputs: Mapping[str, np.ndarray], examples: Examples) -> Kept:
    """The logits, [batch, classes]. Raises `DataError` for examples without labels."""
    if examples.labels is None:
        raise DataError("The split has no labels, so nothing can be evaluated on it.", expected="a label column")
    return {_LOGITS: outputs[_LOGITS]}


def class_rows(kept: Kept, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
    """Accuracy with its Wilson interval, macro F1, calibration error and Brier score of logits [n, classes]."""
    assert labels is not None, "keep asks for labels"
    predicted = kept[_LOGITS].argmax(axis=-1)
    f1 = macro_f1(predicted, labels)
    return [
        outcome_row("accuracy", predicted == labels, model, target),
        Measurement(model=model, metric="f1", target=target, value=f1, unit="ratio", n=len(labels)),
        *_calibration(kept, labels, model, target),
    ]


def outcome_row(metric: str, right: np.ndarray, model: str, target: str) -> Measurement:
    """The share of ``right`` [n] with its Wilson interval and the outcome of each row."""
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
    """The share of examples [n] on which a model answers as the baseline does, with its Wilson interval."""
    count = int(same.sum())
    low, high = wilson_interval(count, len(same))
    share = count / len(same)
    return Measurement(
        model=model, metric="agreement", target=target, value=share, unit="ratio", low=low, high=high, n=len(same)
    )


def mean_row(metric: str, samples: np.ndarray, model: str, target: str) -> Measurement:
    """The mean of ``samples`` [n] with its bootstrap interval and each of them."""
    value, low, high = mean_interval(samples, _SEED)
    raw = tuple(samples.tolist())
    return Measurement(
        model=model, metric=metric, target=target, value=value, unit="ratio", low=low, high=high, n=len(raw), raw=raw
    )


def ratio_row(
    metric: str, parts: np.ndarray, wholes: np.ndarray, model: str, target: str, unit: str = "ratio"
) -> Measurement:
    """A sum over a sum, with its bootstrap interval over rows; 0 without an interval where there is nothing."""
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


def _calibration(kept: Kept, labels: np.ndarray, model: str, target: str) -> list[Measurement]:
    probabilities = class_probabilities(kept)
    right = probabilities.argmax(axis=-1) == labels
    rows = {
        "calibration_error": (calibration_error_interval(probabilities.max(axis=-1), right, _SEED), "ratio"),
        "brier_score": (mean_interval(brier_scores(probabilities, labels), _SEED), ""),
    }
    return [
        Measurement(model=model, metric=name, target=target, unit=unit, n=len(labels), **found._asdict())
        for name, (found, unit) in rows.items()
    ]


def class_probabilities(kept: Kept) -> np.ndarray:
    """Softmax of logits [n, classes]. Raises `ModelError` where they are not finite."""
    outputs = kept[_LOGITS]
    try:
        return softmax(outputs)
    except ValueError as error:
        wrong = int((~np.isfinite(outputs)).any(axis=-1).sum())
        raise ModelError(
            f"The model's outputs are not finite for {wrong} of {len(outputs)} examples.",
            expected="finite logits",
            hint="export or quantize it anew; float16 overflows where float32 does not",
        ) from error


def same_class(kept: Kept, reference: Kept, model: str, target: str) -> list[Measurement]:
    """On how many examples both choose the same class."""
    same = kept[_LOGITS].argmax(axis=-1) == reference[_LOGITS].argmax(axis=-1)
    return [agreement_row(same, model, target)]


def macro_f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Unweighted mean over classes of 2 TP / (2 TP + FP + FN); classes that occur on neither side are left out."""
    scores = []
    for label in np.union1d(predicted, labels):
        true_positives = np.sum((predicted == label) & (labels == label))
        errors = np.sum((predicted == label) != (labels == label))
        scores.append(2 * true_positives / (2 * true_positives + errors))
    return float(np.mean(scores))
