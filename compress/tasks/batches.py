"""Examples of like length together, and what a task keeps of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from compress.tasks.task import Examples, Kept, Task


def by_length(examples: Examples, size: int) -> list[list[int]]:
    """The places of the examples in batches of ``size``, the shortest first."""
    order = np.argsort(examples.lengths(), kind="stable")
    return [order[start : start + size].tolist() for start in range(0, len(order), size)]


def keep_all(
    task: Task,
    examples: Examples,
    batches: Iterable[list[int]],
    answered: Callable[[list[int]], Mapping[str, np.ndarray]],
) -> Kept:
    """What the task keeps of the outputs that ``answered`` gives for the places of each batch, in the examples' order.

    That tells which go together, as texts and their pairs do.
    """
    places: list[int] = []
    parts = []
    for batch in batches:
        parts.append(task.keep(answered(batch), examples, batch))
        places += batch
    order = np.argsort(places)
    return {name: np.concatenate(_widened([part[name] for part in parts]))[order] for name in parts[0]}


def _widened(parts: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """Parts of one width: what is kept of a smaller output ends in NaN, or -1."""
    widest = max(part.shape[-1] for part in parts)
    if all(part.shape[-1] == widest for part in parts) or any(part.ndim != 2 for part in parts):
        return parts
    fill = np.nan if parts[0].dtype.kind == "f" else -1
    return [np.pad(part, ((0, 0), (0, widest - part.shape[-1])), constant_values=fill) for part in parts]
