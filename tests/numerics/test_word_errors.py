"""Word errors against jiwer and by hand; the interval covers what it should."""

from __future__ import annotations

import jiwer
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.numerics.ratio import ratio_interval
from compress.numerics.word_errors import word_errors

WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd", "e"]), max_size=12)


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ("press one now", "press one now", 0),
        ("press one now", "press now", 1),
        ("press one now", "please press one now", 1),
        ("press one now", "press two now", 1),
        ("a b c d", "b c d a", 2),
        ("press one", "", 2),
        ("", "thank you", 2),
        ("", "", 0),
    ],
)
def test_errors_counted_by_hand(said: str, heard: str, errors: int):
    assert word_errors(said.split(), heard.split()) == errors


@given(WORDS.filter(bool), WORDS)
def test_errors_are_those_of_jiwer(said: list[str], heard: list[str]):
    actual = jiwer.process_words(" ".join(said), " ".join(heard))
    assert word_errors(said, heard) == actual.substitutions + actual.deletions + actual.insertions


def test_a_rate_is_all_errors_over_all_words_and_not_a_mean_of_rates():
    assert ratio_interval([1, 0], [1, 9], seed=0).value == pytest.approx(0.1)


def test_an_interval_covers_the_true_rate_as_often_as_it_says():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        words = generator.integers(5, 15, 60)
        actual = ratio_interval(generator.binomial(words, 0.1), words, seed, resamples=300)
        covered += actual.low <= 0.1 <= actual.high
    assert 178 <= covered <= 199, covered


def test_no_words_have_no_rate():
    with pytest.raises(ValueError, match="above 0"):
        ratio_interval([1, 2], [0, 0], seed=0)
