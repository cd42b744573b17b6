"""Examples of like length together, and what a task keeps of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}
