"""Tests of sampling tokens, and of lengths that cover a data set."""

from __future__ import annotations

import itertools
from itertools import combinations

import numpy as np
import pytest
import torch

from compress.numerics.sampling import covering_lengths, equal_shares, spread_sample
from compress.numerics.token_metrics import (
    divergence,
    log_probabilities,
    loop_length,
    negative_log_likelihood,
    repeated_share,
)


@pytest.mark.parametrize("sizes", list(itertools.product((0, 1, 3, 7), repeat=3)))
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_samples_are_as_balanced_as_groups_allow(sizes: tuple[int, ...], count: int):
    count = min(count, sum(sizes))
    taken = equal_shares(np.array(sizes), count)
    ways = [way for way in itertools.product(*(range(size + 1) for size in sizes)) if sum(way) == count]
    assert tuple(taken) in ways
    assert sum(np.square(taken)) == min(sum(np.square(way)) for way in ways)


def test_classes_are_balanced_and_lengths_are_spread():
    lengths = np.arange(200) % 50
    kinds = (np.arange(200) >= 20).astype(int)
    chosen = spread_sample(lengths, kinds, 20, seed=3)
    assert len(set(chosen)) == 20 and list(chosen) == sorted(chosen)
    assert np.bincount(kinds[chosen]).tolist() == [10, 10]
    # 180 rows of the second class, sorted by length, in ten bins: one row from each.
    order = np.argsort(lengths[20:], kind="stable")
    runs = np.sort(lengths[20:][order].reshape(10, 18))
    drawn = np.sort(lengths[chosen[kinds[chosen] == 1]])
    assert all(run[0] <= length <= run[-1] for run, length in zip(runs, drawn, strict=True))


def test_sample_depends_on_seed_and_small_sets_are_taken_whole():
    lengths = np.random.default_rng(0).integers(3, 30, 60)
    assert (spread_sample(lengths, None, 7, 1) == spread_sample(lengths, None, 7, 1)).all()
    assert (spread_sample(lengths, None, 7, 1) != spread_sample(lengths, None, 7, 2)).any()
    assert spread_sample(lengths, None, 100, 0).tolist() == list(range(60))


def tokens(lengths: np.ndarray, chosen: tuple[int, ...]) -> int:
    """Return the token count if each example is padded to the smallest chosen length that fits it."""
    return sum(min(item for item in chosen if item >= length) for length in lengths)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(6))
def test_chosen_lengths_minimize_padding(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, 12, int(generator.integers(1, 30)))
    longest = int(lengths.max() + generator.integers(0, 4))
    chosen = covering_lengths(lengths, count, longest)
    assert len(chosen) <= count and chosen == tuple(sorted(set(chosen))) and chosen[-1] == longest
    every = ((*some, longest) for size in range(count) for some in combinations(range(1, longest), size))
    assert tokens(lengths, chosen) == min(tokens(lengths, item) for item in every)


def test_useless_lengths_are_not_chosen() -> None:
    assert covering_lengths([5, 5, 5], 4, 16) == (5, 16)
    assert covering_lengths([7, 7], 3, 7) == (7,)
    assert covering_lengths([], 3, 9) == (9,)


def test_example_longer_than_the_longest_length_is_refused() -> None:
    with pytest.raises(ValueError, match="12 tokens"):
        covering_lengths([3, 12], 2, 8)


def logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 5.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocabulary)) * scale).astype(np.float32)


def test_chunked_losses_equal_torch():
    given, tokens = logits(150, 33), np.random.default_rng(1).integers(0, 33, 150)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(given).double(), torch.from_numpy(tokens), reduction="none"
    )
    assert negative_log_likelihood(given, tokens) == pytest.approx(expected.numpy(), rel=1e-12)


def test_large_logits_do_not_overflow():
    given = np.array([[1e4, 0.0], [0.0, 1e4]], np.float32)
    assert negative_log_likelihood(given, np.array([0, 0])).tolist() == [0.0, 1e4]
    assert log_probabilities(given)[0].tolist() == [0.0, -1e4]


def test_divergence_equals_torch():
    item, other = logits(9, 40), logits(9, 40, seed=1)
    actual = divergence(log_probabilities(item), log_probabilities(other))
    expected = torch.nn.functional.kl_div(
        torch.from_numpy(other).double().log_softmax(-1),
        torch.from_numpy(item).double().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    assert actual == pytest.approx(expected.numpy(), rel=1e-9)


def test_divergence_of_rounded_distributions_is_never_negative():
    """Rounded to float16, the probabilities of a row do not sum to 1 by themselves."""
    rounded = log_probabilities(logits(200, 500)).astype(np.float16)
    near = log_probabilities(logits(200, 500) + logits(200, 500, 1, 1e-3)).astype(np.float16)
    assert (divergence(rounded, near) >= 0).all()
    assert divergence(rounded, rounded).tolist() == [0.0] * 200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcdefgh", 0.0),
        ("abcdabcd", 1 / 5),  # abcd bcda cdab dabc abcd
        ("aaaaaaaa", 4 / 5),
        ("abababab", 3 / 5),
        ("abc", 0.0),
        ("", 0.0),
    ],
)
def test_repeated_share(text, expected):
    assert repeated_share(np.array([ord(letter) for letter in text])) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("beginning, then " + "abcde" * 4, 5),
        ("abcde" * 3 + "abcdf", 0),
        ("x" * 15, 0),  # too short to be sure
        ("x" * 16, 1),
        ("It is so. " * 2, 10),
        ("It is so. " * 2 + "And", 0),  # the loop ended
        ("abab" * 4, 2),
        ("once again, he says: " * 2, 21),
        ("", 0),
    ],
)
def test_loop_is_detected_only_at_the_end(text, expected):
    assert loop_length(np.array([ord(letter) for letter in text])) == expected
