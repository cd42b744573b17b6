"""Base class of the tasks that assign one class to each example. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from compress.tasks.task import CollectedOutputs, Examples, Task

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers.utils import ModelOutput

    from compress.results.report import Measurement


class Classification(Task):
    """Assignment of one class per example, by logits [batch, classes]."""

    def loss(self, outputs: ModelOutput, labels: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy over the rows that have a label (not -100)."""
        from compress.tasks.classes import cross_entropy

        return cross_entropy(outputs.logits.float(), labels)

    def collect(
        self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]
    ) -> CollectedOutputs:
        """Return the logits, [batch, classes]. Raises `DataError` for examples without labels."""
        from compress.tasks.classes import keep_logits

        return keep_logits(outputs, examples)

    def measure(
        self, collected: CollectedOutputs, labels: np.ndarray | None, model: str, target: str
    ) -> list[Measurement]:
        """Return accuracy with its Wilson interval, macro F1, calibration error and Brier score. See `Task.measure`.

        Args:
            collected: Collected outputs of all examples.
            labels: Labels of all examples.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        from compress.tasks.classes import class_rows

        return class_rows(collected, labels, model, target)

    def probabilities(self, collected: CollectedOutputs) -> np.ndarray:
        """Return the softmax of logits [n, classes]. Raises `ModelError` if they are not finite."""
        from compress.tasks.classes import class_probabilities

        return class_probabilities(collected)

    def compare(
        self, collected: CollectedOutputs, reference: CollectedOutputs, model: str, target: str
    ) -> list[Measurement]:
        """Return the share of examples for which both models choose the same class. See `Task.compare`.

        Args:
            collected: Collected outputs of the model.
            reference: Collected outputs of the baseline.
            model: Name of the model in the report.
            target: Name of the target in the report.
        """
        from compress.tasks.classes import same_class

        return same_class(collected, reference, model, target)
