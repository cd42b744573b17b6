"""Batches of examples of similar length, and collection of a task's outputs over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from compress.tasks.task import CollectedOutputs, Examples, Task


def by_length(examples: Examples, size: int) -> list[list[int]]:
    """Return the indices of the examples in batches of ``size``, shortest first; singly if they are unbatchable."""
    size = 1 if examples.unbatchable else size
    order = np.argsort(examples.lengths(), kind="stable")
    return [order[start : start + size].tolist() for start in range(0, len(order), size)]


def keep_all(
    task: Task,
    examples: Examples,
    batches: Iterable[list[int]],
    answered: Callable[[list[int]], Mapping[str, np.ndarray]],
) -> CollectedOutputs:
    """Return the task's collected outputs for all batches, in the order of the examples.

    Args:
        task: The task.
        examples: The examples.
        batches: Indices of the examples of each batch. Examples that belong together, such as a text and its pair,
            follow each other.
        answered: Returns the outputs of the model for a batch.
    """
    indices: list[int] = []
    parts = []
    for batch in batches:
        parts.append(task.collect(answered(batch), examples, batch))
        indices += batch
    order = np.argsort(indices)
    return {name: np.concatenate(_widened([part[name] for part in parts]))[order] for name in parts[0]}


def _widened(parts: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """Pad collected parts to the same width with NaN or -1."""
    widest = max(part.shape[-1] for part in parts)
    if all(part.shape[-1] == widest for part in parts) or any(part.ndim != 2 for part in parts):
        return parts
    fill = np.nan if parts[0].dtype.kind == "f" else -1
    return [np.pad(part, ((0, 0), (0, widest - part.shape[-1])), constant_values=fill) for part in parts]
