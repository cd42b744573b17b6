"""A few lengths to which examples of any length are padded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


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
