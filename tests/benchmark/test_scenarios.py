from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
from scipy import stats

from compress.benchmark.scenarios import (
    batches_by_length,
    evenly_spaced,
    length_buckets,
    mixed_rounds,
    one_of_each_length,
    request_gaps_ms,
    sample_by_length,
)


def test_examples_are_drawn_once_each_in_order_of_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 500)
    sampled = sample_by_length(lengths, 100, seed=1)
    assert len(set(sampled)) == 100
    assert list(lengths[sampled]) == sorted(lengths[sampled])
    assert sampled == sample_by_length(lengths, 100, seed=1)
    assert sampled != sample_by_length(lengths, 100, seed=2)


def test_fewer_examples_than_wanted_are_all_taken() -> None:
    assert sample_by_length(np.array([5, 3, 4]), 10, seed=0) == [1, 2, 0]


@pytest.mark.parametrize(("count", "size"), [(256, 32), (250, 32), (7, 32), (10, 1)])
def test_every_example_comes_once_before_any_comes_again(count: int, size: int) -> None:
    calls = [i for calls in islice(mixed_rounds(count, size, seed=0), 3 * count) for i in calls]
    for start in range(0, len(calls) - count + 1, count):
        assert sorted(calls[start : start + count]) == list(range(count))


def test_rounds_are_full_and_in_random_order() -> None:
    rounds = list(islice(mixed_rounds(50, 1, seed=0), 50))
    assert {len(calls) for calls in rounds} == {1}
    assert abs(np.corrcoef([i for (i,) in rounds], np.arange(50))[0, 1]) < 0.5


def test_one_example_stands_for_each_length() -> None:
    assert one_of_each_length(np.array([4, 4, 7, 9, 9, 9])) == [0, 2, 3]


def test_arrivals_are_a_poisson_process() -> None:
    gaps = np.array(request_gaps_ms(20_000, per_second=250.0, seed=0))
    # Exponential with mean 4 ms: mean and standard deviation are equal, and it has no memory.
    assert stats.kstest(gaps, "expon", args=(0, 4.0)).pvalue > 0.01
    assert np.corrcoef(gaps[1:], gaps[:-1])[0, 1] == pytest.approx(0, abs=0.02)


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
