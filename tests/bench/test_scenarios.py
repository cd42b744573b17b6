from __future__ import annotations

import numpy as np
import pytest

from compress.bench.scenarios import (
    batches_by_length,
    draw_by_length,
    evenly_spaced,
    length_buckets,
    stratified_rounds,
)


def test_examples_are_drawn_once_each_in_order_of_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 500)
    drawn = draw_by_length(lengths, 100, seed=1)
    assert len(set(drawn)) == 100
    assert list(lengths[drawn]) == sorted(lengths[drawn])
    assert drawn == draw_by_length(lengths, 100, seed=1)
    assert drawn != draw_by_length(lengths, 100, seed=2)


def test_fewer_examples_than_wanted_are_all_taken() -> None:
    assert draw_by_length(np.array([5, 3, 4]), 10, seed=0) == [1, 2, 0]


@pytest.mark.parametrize(("count", "size"), [(256, 32), (250, 32), (7, 32), (10, 1)])
def test_rounds_share_out_the_examples_with_like_lengths(count: int, size: int) -> None:
    rounds = stratified_rounds(count, size, seed=0)
    assert sorted(i for calls in rounds for i in calls) == list(range(count))
    assert max(map(len, rounds)) <= size
    if size > 1:
        # Position stands for length: the middle of every round is the middle of the whole.
        assert all(abs(np.median(calls) - (count - 1) / 2) <= len(rounds) / 2 for calls in rounds)


def test_rounds_of_one_call_are_not_in_order_of_length() -> None:
    order = [i for (i,) in stratified_rounds(50, 1, seed=0)]
    assert abs(np.corrcoef(order, np.arange(50))[0, 1]) < 0.5


def test_batches_are_full_and_of_neighbours() -> None:
    assert batches_by_length(10, 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert batches_by_length(3, 4) == [[0, 1, 2, 0]]


def test_evenly_spaced_spans_the_list() -> None:
    assert evenly_spaced(list(range(8)), 2) == [2, 6]
    assert evenly_spaced(list(range(8)), 1) == [4]
    assert evenly_spaced([3, 4], 5) == [3, 4]


def test_buckets_are_the_quarters() -> None:
    assert length_buckets(np.arange(1, 101)) == [(1, 25), (26, 50), (51, 75), (76, 100)]


def test_tied_lengths_make_fewer_buckets() -> None:
    assert length_buckets(np.array([7] * 9)) == [(7, 7)]
    assert length_buckets(np.array([3, 3, 3, 3, 3, 3, 8, 9])) == [(3, 3), (8, 9)]
