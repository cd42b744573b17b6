"""Base class of tasks with classes, and the labels, loss and rows of metrics that tasks share. Imports no torch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from compress.data.slices import Slice
from compress.results.report import Measurement
from compress.tasks.lazy_modules import calibration, np, pa, statistics, torch
from compress.tasks.task import LOGITS, Examples, NamedArrays, Task
from compress.utils.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from transformers.utils import ModelOutput

    from compress.models.model import Processor

_IGNORED = -100
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
    if not bool((labels != _IGNORED).any()):
        return logits.sum() * 0.0
    return torch.nn.functional.cross_entropy(logits, labels, ignore_index=_IGNORED)


_Reference = TypeVar("_Reference")


def required(reference: _Reference | None, noun: str, column: str) -> _Reference:
    """Return the reference values of a split. Raises `DataError` if there are none.

    Args:
        reference: Labels or other reference values.
        noun: Noun for the values in the message.
        column: Column of the data that holds them.
    """
    if reference is None:
        raise DataError(f"The split has no {noun}, so nothing can be evaluated on it.", expected=f"a column {column}")
    return reference


def finite(values: np.ndarray, noun: str = "outputs") -> np.ndarray:
    """Return a model's ``values`` unchanged. Raises `ModelError` if one of them is not finite."""
    if not np.isfinite(values).all():
        raise ModelError(
            f"The model's {noun} are not finite.",
            expected=f"finite {noun}",
            hint="export or quantize it again; float16 overflows where float32 does not",
        )
    return values


def interval_row(
    metric: str,
    interval: Sequence[float | None],
    count: int,
    model: str,
    target: str,
    unit: str = "ratio",
    raw: Iterable[float] | None = None,
) -> Measurement:
    """Return a metric with its interval.

    Args:
        metric: Name of the metric.
        interval: Value and bounds of the interval, which are None for a metric without one.
        count: Number of samples.
        model: Name of the model in the report.
        target: Name of the target in the report.
        unit: Unit of the metric.
        raw: Outcome of each sample.
    """
    value, low, high = interval
    assert value is not None, "only the bounds may be missing"
    outcomes = None if raw is None else tuple(map(float, raw))
    return Measurement(
        model=model, metric=metric, target=target, value=value, unit=unit, low=low, high=high, n=count, raw=outcomes
    )


def outcome_row(metric: str, right: np.ndarray, model: str, target: str) -> Measurement:
    """Return the share of correct rows with its Wilson interval and the outcome of each row.

    Args:
        metric: Name of the metric.
        right: Outcome of each row, [n] bool.
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    bounds = statistics.wilson_interval(int(right.sum()), len(right))
    return interval_row(metric, (float(right.mean()), *bounds), len(right), model, target, raw=right)


def agreement_row(same: np.ndarray, model: str, target: str) -> Measurement:
    """Return the share of examples [n] that are answered like the baseline, with its Wilson interval."""
    return outcome_row("agreement", same, model, target).model_copy(update={"raw": None})


def mean_row(metric: str, samples: np.ndarray, model: str, target: str) -> Measurement:
    """Return the mean of ``samples`` with its bootstrap interval and all samples.

    Args:
        metric: Name of the metric.
        samples: One value per row, [n].
        model: Name of the model in the report.
        target: Name of the target in the report.
    """
    return interval_row(
        metric, calibration.mean_interval(samples, _SEED), len(samples), model, target, raw=samples.tolist()
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
        return interval_row(metric, (0.0, None, None), max(len(parts), 1), model, target, unit)
    interval, raw = statistics.ratio_interval(parts, wholes, _SEED), statistics.linearized(parts, wholes)
    return interval_row(metric, interval, len(parts), model, target, unit, raw)


def macro_f1_contributions(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each row's contribution to macro F1, [n], whose mean is macro F1, the unweighted mean of F1 over classes.

    F1 of a class is 2 TP / (rows predicted as it + rows labelled as it), for the classes that occur on either side. It
    is linearized as in `statistics.linearized`, so that the variance of the mean is that of macro F1 to first order.
    """
    classes, indices = np.unique(np.concatenate([predicted, labels]), return_inverse=True)
    predicted, labels = indices[: len(labels)], indices[len(labels) :]
    occurrences = np.bincount(indices, minlength=len(classes))
    right = predicted == labels
    scores = 2 * np.bincount(labels[right], minlength=len(classes)) / occurrences
    deviations = 2 * right / occurrences[labels] - (scores / occurrences)[predicted] - (scores / occurrences)[labels]
    return np.asarray(scores.mean() + len(labels) / len(classes) * deviations)


class Classification(Task):
    """Assignment of one class per example, by logits [batch, classes]."""

    slices: tuple[Slice, ...] = (Slice(column="label"),)
    metrics: tuple[str, ...] = ("accuracy", "f1", "calibration_error", "brier_score", "agreement")

    @abstractmethod
    def encode_inputs(self, rows: pa.Table, processor: Processor, max_length: int) -> Examples:
        """Convert rows to model inputs without labels. Raises `DataError`."""

    def encode(self, rows: pa.Table, processor: Processor, labels: Sequence[str] | None, max_length: int) -> Examples:
        """Return the inputs, with class ids [n] as labels if the rows have a label. See `Task.encode`.

        Args:
            rows: Rows with the task's columns; label columns are optional.
            processor: Processor of the model.
            labels: Class names of the model, or None to ignore labels.
            max_length: Number of tokens after which texts are truncated.
        """
        examples = self.encode_inputs(rows, processor, max_length)
        if labels is None or "label" not in rows.column_names:
            return examples
        return replace(examples, labels=label_ids(rows["label"].to_pylist(), labels))

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy over the rows that have a label (not -100)."""
        return cross_entropy(outputs.logits.float(), labels)

    def collect(self, outputs: NamedArrays, examples: Examples, indices: Sequence[int]) -> NamedArrays:
        """Return the logits, [batch, classes]. Raises `DataError` for examples without labels."""
        required(examples.labels, "labels", "label")
        return {LOGITS: outputs[LOGITS]}

    def measure(self, collected: NamedArrays, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Return accuracy with its Wilson interval, macro F1, calibration error and Brier score. See `Task.measure`.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        assert labels is not None, "`collect` requires labels"
        predicted, probabilities = collected[LOGITS].argmax(axis=-1), self.probabilities(collected)
        right = probabilities.argmax(axis=-1) == labels
        error = calibration.calibration_error_interval(probabilities.max(axis=-1), right, _SEED)
        brier = calibration.mean_interval(calibration.brier_scores(probabilities, labels), _SEED)
        count = len(labels)
        return [
            outcome_row("accuracy", predicted == labels, model, target),
            mean_row("f1", macro_f1_contributions(predicted, labels), model, target),
            interval_row("calibration_error", error, count, model, target),
            interval_row("brier_score", brier, count, model, target, unit=""),
        ]

    def probabilities(self, collected: NamedArrays) -> np.ndarray:
        """Return the softmax of logits [n, classes]. Raises `ModelError` if they are not finite."""
        outputs = collected[LOGITS]
        try:
            return calibration.softmax(outputs)
        except ValueError as error:
            wrong = int((~np.isfinite(outputs)).any(axis=-1).sum())
            raise ModelError(
                f"The model's outputs are not finite for {wrong} of {len(outputs)} examples.",
                expected="finite logits",
                hint="export or quantize it again; float16 overflows where float32 does not",
            ) from error

    def interpret(
        self,
        answers: Sequence[Any],
        examples: Examples,
        rows: pa.Table,
        processor: Processor,
        labels: Sequence[str] | None,
    ) -> list[Any]:
        """Return `label` and its probability `score` for each row, and the probabilities of all labels as `scores`.

        Args:
            answers: Answer to each example, as `Examples.answers` returns them, or a generated text.
            examples: The examples that `raw_examples` made of the rows.
            rows: Rows of raw inputs.
            processor: Processor of the model.
            labels: Class names of the model, if it has any.
        """
        logits = np.stack(answers)
        probabilities, chosen = self.probabilities({LOGITS: logits}), logits.argmax(axis=-1)
        names = labels or [str(index) for index in range(logits.shape[-1])]
        return [
            {"label": names[index], "score": float(row[index]), "scores": dict(zip(names, row.tolist(), strict=True))}
            for index, row in zip(chosen.tolist(), probabilities, strict=True)
        ]

    def compare(self, collected: NamedArrays, reference: NamedArrays, model: str, target: str) -> list[Measurement]:
        """Return the share of examples for which both models choose the same class. See `Task.compare`.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        same = collected[LOGITS].argmax(axis=-1) == reference[LOGITS].argmax(axis=-1)
        return [agreement_row(same, model, target)]
