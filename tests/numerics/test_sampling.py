"""Calibration examples: equal shares by trying them all, each length's run once, the same each time."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from compress.numerics.sampling import equal_shares, spread_sample


@pytest.mark.parametrize("sizes", list(itertools.product((0, 1, 3, 7), repeat=3)))
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_shares_are_as_even_as_groups_allow(sizes: tuple[int, ...], count: int):
    count = min(count, sum(sizes))
    taken = equal_shares(np.array(sizes), count)
    ways = [way for way in itertools.product(*(range(size + 1) for size in sizes)) if sum(way) == count]
    assert tuple(taken) in ways
    assert sum(np.square(taken)) == min(sum(np.square(way)) for way in ways)


def test_kinds_are_even_and_lengths_are_spread():
    lengths = np.arange(200) % 50
    kinds = (np.arange(200) >= 20).astype(int)
    chosen = spread_sample(lengths, kinds, 20, seed=3)
    assert len(set(chosen)) == 20 and list(chosen) == sorted(chosen)
    assert np.bincount(kinds[chosen]).tolist() == [10, 10]
    # 180 rows of the second kind in ten runs by length: one of each.
    order = np.argsort(lengths[20:], kind="stable")
    runs = np.sort(lengths[20:][order].reshape(10, 18))
    drawn = np.sort(lengths[chosen[kinds[chosen] == 1]])
    assert all(run[0] <= length <= run[-1] for run, length in zip(runs, drawn, strict=True))


def test_a_seed_decides_and_too_few_are_all_taken():
    lengths = np.random.default_rng(0).integers(3, 30, 60)
    assert (spread_sample(lengths, None, 7, 1) == spread_sample(lengths, None, 7, 1)).all()
    assert (spread_sample(lengths, None, 7, 1) != spread_sample(lengths, None, 7, 2)).any()
    assert spread_sample(lengths, None, 100, 0).tolist() == list(range(60))
