"""Which examples are timed, and how they are grouped into calls and rounds. Positions refer to `lengths`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Groups = list[list[int]]


def sample_by_length(lengths: np.ndarray, count: int, seed: int) -> list[int]:
    """Up to ``count`` examples drawn without replacement, in the order of their lengths."""
    generator = np.random.default_rng(seed)
    drawn = generator.permutation(len(lengths))[:count]
    return [int(i) for i in drawn[np.argsort(lengths[drawn], kind="stable")]]


def mixed_rounds(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Rounds of ``size`` of ``count`` examples, without end; every example once before any comes again.

    Each pass over the examples is in a new random order; a round at its end takes the rest from the next pass.
    """
    generator = np.random.default_rng(seed)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += generator.permutation(count).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def one_of_each_length(lengths: np.ndarray) -> list[int]:
    """Position of the first example of each length; a runtime plans its memory anew for every shape."""
    _, first = np.unique(lengths, return_index=True)
    return [int(i) for i in first]


def request_gaps_ms(count: int, per_second: float, seed: int) -> list[float]:
    """Waiting times between ``count`` arrivals of a Poisson process: exponential with mean 1000 / ``per_second``."""
    gaps: list[float] = np.random.default_rng(seed).exponential(1000 / per_second, count).tolist()
    return gaps


def batches_by_length(count: int, size: int) -> Groups:
    """Batches of exactly ``size`` neighbours of ``count`` examples sorted by length, to pad little.

    A short remainder is left out; fewer examples than one batch are repeated to fill it.
    """
    if count < size:
        return [[i % count for i in range(size)]]
    return [list(range(start, start + size)) for start in range(0, count - size + 1, size)]


def evenly_spaced(items: list[int], count: int) -> list[int]:
    """``count`` of ``items``, spread over the whole list with the ends avoided; all where there are fewer."""
    if count >= len(items):
        return items
    return [items[int((k + 0.5) * len(items) / count)] for k in range(count)]


def length_buckets(lengths: np.ndarray) -> list[tuple[int, int]]:
    """The quarters of the data by length, as (shortest, longest); fewer where lengths tie over a boundary."""
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))
    buckets = []
    below = -1
    for edge in edges:
        inside = lengths[(lengths > below) & (lengths <= edge)]
        buckets.append((int(inside.min()), int(inside.max())))
        below = edge
    return buckets
