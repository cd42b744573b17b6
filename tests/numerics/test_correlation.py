import numpy as np
import pytest

from compress.numerics.correlation import pearson, spearman


def test_pearson_and_its_interval_are_fishers() -> None:
    actual, targets = [1.0, 2.0, 3.0, 5.0, 4.0, 7.0], [1.0, 3.0, 2.0, 5.0, 6.0, 6.0]
    estimate = pearson(actual, targets)
    expected = np.corrcoef(actual, targets)[0, 1]
    assert estimate.value == pytest.approx(expected)
    width = 1.959964 / np.sqrt(3)
    assert estimate.low == pytest.approx(np.tanh(np.arctanh(expected) - width), abs=1e-6)
    assert estimate.high == pytest.approx(np.tanh(np.arctanh(expected) + width), abs=1e-6)


def test_spearman_is_pearson_of_ranks_with_ties_in_the_middle() -> None:
    actual, expected = [0.1, 0.4, 0.2, 9.0, 0.3], [1.0, 5.0, 5.0, 7.0, 2.0]
    estimate = spearman(actual, expected)
    assert estimate.value == pytest.approx(np.corrcoef([1, 4, 2, 5, 3], [1, 3.5, 3.5, 5, 2])[0, 1])
    assert estimate.low is not None and estimate.low < estimate.value


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator, true, inside = np.random.default_rng(0), 0.6, 0
    for _ in range(400):
        item = generator.normal(size=40)
        other = true * item + np.sqrt(1 - true**2) * generator.normal(size=40)
        estimate = pearson(item.tolist(), other.tolist())
        inside += estimate.low <= true <= estimate.high
    assert 0.92 < inside / 400 < 0.98


def test_a_perfect_correlation_has_no_width() -> None:
    assert spearman([1, 2, 3, 4], [1, 2, 3, 9]).low == 1
