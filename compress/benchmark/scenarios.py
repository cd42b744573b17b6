"""Choice of the timed examples, and their grouping into calls and rounds. Examples are positions in ``lengths``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Groups = list[list[int]]


def sample_by_length(lengths: np.ndarray, count: int, seed: int) -> list[int]:
    """Return up to ``count`` random examples without replacement, in the order of their lengths."""
    generator = np.random.default_rng(seed)
    sampled = generator.permutation(len(lengths))[:count]
    return [int(i) for i in sampled[np.argsort(lengths[sampled], kind="stable")]]


def mixed_rounds(count: int, size: int, seed: int) -> Iterator[list[int]]:
    """Yield rounds of ``size`` of ``count`` examples without end, every example once before any repeats.

    Each pass over the examples has a new random order. A round at its end takes the remainder from the next pass.
    """
    generator = np.random.default_rng(seed)
    pending: list[int] = []
    while True:
        while len(pending) < size:
            pending += generator.permutation(count).tolist()
        yield pending[:size]
        pending = pending[size:]


def one_of_each_length(lengths: np.ndarray) -> list[int]:
    """Return the first example of each length, since a runtime plans its memory anew for every shape."""
    _, first = np.unique(lengths, return_index=True)
    return [int(i) for i in first]


def request_gaps_ms(count: int, per_second: float, seed: int) -> list[float]:
    """Return times between requests of a Poisson process in ms: exponential with mean 1000 / ``per_second``."""
    gaps: list[float] = np.random.default_rng(seed).exponential(1000 / per_second, count).tolist()
    return gaps


def batches_by_length(count: int, size: int) -> Groups:
    """Return batches of exactly ``size`` of ``count`` examples sorted by length, which need little padding.

    A short remainder is left out. Fewer examples than one batch are repeated to fill it.
    """
    if count < size:
        return [[i % count for i in range(size)]]
    return [list(range(start, start + size)) for start in range(0, count - size + 1, size)]


def evenly_spaced(items: list[int], count: int) -> list[int]:
    """Return ``count`` of ``items``, spread over the list without its ends, or all if there are fewer."""
    if count >= len(items):
        return items
    return [items[int((k + 0.5) * len(items) / count)] for k in range(count)]


def length_buckets(lengths: np.ndarray) -> list[tuple[int, int]]:
    """Return the quarters of the data by length as (shortest, longest), fewer if equal lengths lie on a boundary."""
    edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75, 1.0], method="inverted_cdf"))
    buckets = []
    below = -1
    for edge in edges:
        inside = lengths[(lengths > below) & (lengths <= edge)]
        buckets.append((int(inside.min()), int(inside.max())))
        below = edge
    return buckets
