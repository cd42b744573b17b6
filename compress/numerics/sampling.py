"""Which examples stand for many: as many of each kind, of all lengths."""

from __future__ import annotations

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
