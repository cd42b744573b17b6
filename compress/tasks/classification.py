"""What tasks share that give each example one class. Importing this imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compress.tasks.task import Examples, Kept, Task

if TYPE_CHECKING:
    import numpy as np
    import torch

    from compress.results.measurement import Measurement


class Classification(Task):
    """One of the model's classes for each example, by its logits [batch, classes]."""

    def loss(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy over the rows that have a label; a label of -100 marks a row without."""
        from compress.tasks.classes import cross_entropy

        return cross_entropy(outputs.logits.float(), labels)

    def keep(self, outputs: Mapping[str, np.ndarray], examples: Examples, indices: Sequence[int]) -> Kept:
        """The logits, [batch, classes]. Raises `DataError` for examples without labels."""
        from compress.tasks.classes import keep_logits

        return keep_logits(outputs, examples)

    def measure(self, kept: Kept, labels: np.ndarray | None, model: str, target: str) -> list[Measurement]:
        """Accuracy with its Wilson interval, macro F1, calibration error and Brier score."""
        from compress.tasks.classes import class_rows

        return class_rows(kept, labels, model, target)

    def probabilities(self, kept: Kept) -> np.ndarray:
        """Softmax of logits [n, classes]. Raises `ModelError` where they are not finite."""
        from compress.tasks.classes import class_probabilities

        return class_probabilities(kept)

    def compare(self, kept: Kept, reference: Kept, model: str, target: str) -> list[Measurement]:
        """On how many examples both choose the same class."""
        from compress.tasks.classes import same_class

        return same_class(kept, reference, model, target)
