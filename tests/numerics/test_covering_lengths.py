"""Lengths to pad to, against every choice that there is."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from compress.numerics.sampling import covering_lengths


def tokens(lengths: np.ndarray, chosen: tuple[int, ...]) -> int:
    """What is computed when each example is padded to the least chosen length that holds it."""
    return sum(min(item for item in chosen if item >= length) for length in lengths)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_pads_less(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 12, int(generator.integers(1, 30)))
    longest = int(lengths.max() + generator.integers(0, 4))
    chosen = covering_lengths(lengths, count, longest)
    assert len(chosen) <= count and chosen == tuple(sorted(set(chosen))) and chosen[-1] == longest
    every = ((*some, longest) for size in range(count) for some in combinations(range(1, longest), size))
    assert tokens(lengths, chosen) == min(tokens(lengths, item) for item in every)


def test_no_more_lengths_than_help() -> None:
    assert covering_lengths([5, 5, 5], 4, 16) == (5, 16)
    assert covering_lengths([7, 7], 3, 7) == (7,)
    assert covering_lengths([], 3, 9) == (9,)


def test_an_example_beyond_the_longest_is_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens"):
        covering_lengths([3, 12], 2, 8)
