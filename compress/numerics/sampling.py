"""Selection of representative examples by class and length, and of a few lengths that cover all examples."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def spread_sample(lengths: np.ndarray, kinds: np.ndarray | None, count: int, seed: int) -> np.ndarray:
    """Return ascending indices of ``count`` examples (or all), with equally many of each class as far as possible.

    Within a class the examples are sorted by length and divided into as many runs as are needed; one example is sampled
    from each run.

    Args:
        lengths: Length of each example [n].
        kinds: Class of each example [n], or None.
        count: Number of examples.
        seed: Seed of the sampling.
    """
    total = len(lengths)
    kinds = np.zeros(total, np.int64) if kinds is None else kinds
    generator = np.random.default_rng(seed)
    names, sizes = np.unique(kinds, return_counts=True)
    chosen = []
    for name, share in zip(names, equal_shares(sizes, min(count, total)), strict=True):
        members = np.flatnonzero(kinds == name)
        # Ties in length are ordered randomly.
        order = members[np.lexsort((generator.permutation(len(members)), lengths[members]))]
        # Divide the sorted members into equal runs.
        edges = np.linspace(0, len(order), share + 1)
        chosen += [order[int(generator.integers(int(a), max(int(a) + 1, int(b))))] for a, b in pairwise(edges)]
    return np.array(sorted(chosen), dtype=np.int64)


def equal_shares(sizes: np.ndarray, count: int) -> np.ndarray:
    """Return the number to take from groups of ``sizes``, ``count`` in total: equal except for small groups."""
    taken = np.zeros(len(sizes), np.int64)
    while taken.sum() < count:
        open_groups = np.flatnonzero(taken < sizes)
        remaining = count - int(taken.sum())
        per_group = max(1, remaining // len(open_groups))
        for group in open_groups[: remaining if per_group == 1 else None]:
            taken[group] += min(per_group, sizes[group] - taken[group], count - int(taken.sum()))
    return taken


def covering_lengths(lengths: Sequence[int] | np.ndarray, count: int, longest: int) -> tuple[int, ...]:
    """Return at most ``count`` ascending lengths, ending with ``longest``, with the least padding of ``lengths``.

    Each example is padded to the least chosen length that holds it, and none may exceed ``longest``. With n(l) examples
    of at most l, the number of computed tokens is c_1 n(c_1) + c_2 (n(c_2) - n(c_1)) + ... Every chosen length but the
    last occurs, since a shorter one would suffice otherwise. The least sum over the first j lengths therefore follows
    from that over fewer: exact, in O(count * distinct lengths²). Among equal sums the one with fewer lengths is chosen.
    """
    values, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    if len(values) and values[-1] > longest:
        raise ValueError(f"an example has {values[-1]} tokens, more than {longest}")
    # Candidate lengths: those that occur, and the longest.
    ends = np.append(values[values < longest], longest)
    held = np.array([counts[values <= end].sum() for end in ends])
    # cost[i, j]: tokens of the examples that are longer than ends[i - 1] and padded to ends[j].
    cost = ends[None, :] * (held[None, :] - np.append(0, held[:-1])[:, None])
    cost = np.where(np.tri(len(ends), k=-1, dtype=bool), np.inf, cost.astype(float))
    best = cost[0]
    prefixes: list[list[int]] = [[] for _ in ends]
    totals, choices = [best[-1]], [[longest]]
    # Dynamic programming over the number of lengths.
    for _ in range(1, min(count, len(ends))):
        through = np.append(np.inf, best[:-1])[:, None] + cost
        previous = np.argmin(through, axis=0)
        best = through[previous, np.arange(len(ends))]
        prefixes = [[*prefixes[i - 1], int(ends[i - 1])] if i else [] for i in previous]
        totals.append(best[-1])
        choices.append([*prefixes[-1], longest])
    return tuple(choices[int(np.argmin(totals))])
