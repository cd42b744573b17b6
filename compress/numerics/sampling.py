"""Which examples stand for many, as many of each kind and of all lengths; and a few lengths that hold them all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np


def spread_sample(lengths: np.ndarray, kinds: np.ndarray | None, count: int, seed: int) -> np.ndarray:
    """Indices of ``count`` examples (or all), ascending: equally many of each of ``kinds`` as far as there are.

    Within a kind the examples are put in order of length and cut into as many runs as are taken of it; one is drawn
    from each run.
    """
    total = len(lengths)
    kinds = np.zeros(total, np.int64) if kinds is None else kinds
    generator = np.random.default_rng(seed)
    names, sizes = np.unique(kinds, return_counts=True)
    chosen = []
    for name, share in zip(names, equal_shares(sizes, min(count, total)), strict=True):
        members = np.flatnonzero(kinds == name)
        order = members[np.lexsort((generator.permutation(len(members)), lengths[members]))]
        edges = np.linspace(0, len(order), share + 1)
        chosen += [order[int(generator.integers(int(a), max(int(a) + 1, int(b))))] for a, b in pairwise(edges)]
    return np.array(sorted(chosen), dtype=np.int64)


def equal_shares(sizes: np.ndarray, count: int) -> np.ndarray:
    """How many to take of groups of ``sizes``, ``count`` in all: alike, but for groups that have too few."""
    taken = np.zeros(len(sizes), np.int64)
    while taken.sum() < count:
        room = np.flatnonzero(taken < sizes)
        left = count - int(taken.sum())
        each = max(1, left // len(room))
        for place in room[: left if each == 1 else None]:
            taken[place] += min(each, sizes[place] - taken[place], count - int(taken.sum()))
    return taken


def covering_lengths(lengths: Sequence[int] | np.ndarray, count: int, longest: int) -> tuple[int, ...]:
    """At most ``count`` ascending lengths, the last of them ``longest``, with the least padding of ``lengths``.

    Each example is padded to the least chosen length that holds it, and none may exceed ``longest``. With n(l) examples
    of at most l, the tokens computed are c_1 n(c_1) + c_2 (n(c_2) - n(c_1)) + ...; every chosen length but the last is
    one that occurs, since a shorter one would do otherwise. So the least sum over the first j lengths is found from
    that over fewer: exact, in O(count * distinct lengths²). Of equal sums the one with fewer lengths is taken.
    """
    values, counts = np.unique(np.asarray(lengths, dtype=np.int64), return_counts=True)
    if len(values) and values[-1] > longest:
        raise ValueError(f"an example has {values[-1]} tokens, more than {longest}")
    ends = np.append(values[values < longest], longest)
    held = np.array([counts[values <= end].sum() for end in ends])
    # cost[i, j]: tokens of the examples that are longer than ends[i - 1] and padded to ends[j].
    cost = ends[None, :] * (held[None, :] - np.append(0, held[:-1])[:, None])
    cost = np.where(np.tri(len(ends), k=-1, dtype=bool), np.inf, cost.astype(float))
    best = cost[0]
    found: list[list[int]] = [[] for _ in ends]
    totals, choices = [best[-1]], [[longest]]
    for _ in range(1, min(count, len(ends))):
        through = np.append(np.inf, best[:-1])[:, None] + cost
        before = np.argmin(through, axis=0)
        best = through[before, np.arange(len(ends))]
        found = [[*found[i - 1], int(ends[i - 1])] if i else [] for i in before]
        totals.append(best[-1])
        choices.append([*found[-1], longest])
    return tuple(choices[int(np.argmin(totals))])
