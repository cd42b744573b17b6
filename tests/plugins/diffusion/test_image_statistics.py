"""Distances of sets of pictures, against closed forms, scipy's root of a matrix, finite differences and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import sqrtm

from compress.plugins.diffusion.image_statistics import (
    Gaussian,
    diversity,
    frechet,
    frechet_distance,
    frechet_interval,
    frechet_shares,
    gaussian_of,
    in_manifold,
)


def _features(seed: int, count: int, width: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mix = np.random.default_rng(seed + 100).normal(size=(width, width)) / math.sqrt(width)
    return scale * generator.normal(size=(count, width)) @ mix + shift


def test_two_normal_distributions_of_one_feature() -> None:
    # (m - w)² + (s - t)², of standard deviations s and t.
    first, second = Gaussian(np.array([1.0]), np.array([[4.0]])), Gaussian(np.array([3.0]), np.array([[0.25]]))
    assert frechet(first, second) == pytest.approx((1 - 3) ** 2 + (2 - 0.5) ** 2)


def test_independent_features_add_up() -> None:
    generator = np.random.default_rng(0)
    means, deviations = generator.normal(size=(2, 5)), generator.uniform(0.1, 2, size=(2, 5))
    both = [Gaussian(mean, np.diag(deviation**2)) for mean, deviation in zip(means, deviations, strict=True)]
    expected = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert frechet(*both) == pytest.approx(expected)


def test_the_distance_is_that_of_scipys_root() -> None:
    generated, real = _features(1, 300, 6, 1.3, 0.2), _features(2, 400, 6)
    covariances = np.cov(generated, rowvar=False), np.cov(real, rowvar=False)
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(generated.mean(0) - real.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(generated, real) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(real, generated) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(generated, generated) == pytest.approx(0, abs=1e-9)


def test_a_feature_that_never_varies_costs_only_its_mean() -> None:
    generated, real = (
        np.column_stack([_features(seed, 50, 3), np.full(50, level)]) for seed, level in ((1, 2.0), (2, 5.0))
    )
    assert frechet_distance(generated, real) == pytest.approx(frechet_distance(generated[:, :3], real[:, :3]) + 9)


def _weighted(rows: np.ndarray, weights: np.ndarray) -> Gaussian:
    mean = weights @ rows
    away = rows - mean
    return Gaussian(mean, len(rows) / (len(rows) - 1) * (away * weights[:, None]).T @ away)


def test_shares_are_what_a_little_more_of_a_picture_changes() -> None:
    generated, real = _features(3, 40, 4, 1.5, 0.5), _features(4, 200, 4)
    shares = frechet_shares(generated, real)
    value = frechet_distance(generated, real)
    assert shares.mean() == pytest.approx(value)
    even, step = np.full(40, 1 / 40), 1e-5
    for picture in (0, 7, 39):
        toward = np.eye(40)[picture] - even
        ahead, behind = (
            frechet(_weighted(generated, even + sign * step * toward), gaussian_of(real)) for sign in (1.0, -1.0)
        )
        assert shares[picture] - value == pytest.approx((ahead - behind) / (2 * step), rel=1e-4)


def test_too_few_pictures_have_no_shares() -> None:
    with pytest.raises(ValueError, match="4 pictures"):
        frechet_shares(_features(0, 4, 4), _features(1, 40, 4))


def test_the_interval_is_about_as_wide_as_the_shares_say() -> None:
    generated, real = _features(5, 400, 3, 1.4, 0.4), _features(6, 400, 3)
    value, low, high = frechet_interval(generated, real, seed=0, resamples=400)
    half = 1.96 * frechet_shares(generated, real).std(ddof=1) / math.sqrt(400)
    assert value == pytest.approx(frechet_distance(generated, real))
    assert (high - low) / 2 == pytest.approx(half, rel=0.15)
    assert (high + low) / 2 == pytest.approx(value, abs=0.3 * half)


def test_the_interval_lies_about_a_distance_that_is_all_chance() -> None:
    # Of few pictures in many features resamples lie far above: 60 rows of 15 features, from the same distribution.
    mix = np.random.default_rng(11).normal(size=(15, 15))
    generated, real = (
        np.random.default_rng(seed).normal(size=(count, 15)) @ mix for seed, count in ((12, 60), (13, 2000))
    )
    value, low, high = frechet_interval(generated, real, seed=0)
    drawn = np.random.default_rng(1).integers(0, 60, (100, 60))
    assert min(frechet_distance(generated[rows], real) for rows in drawn) > value
    assert 0.2 < (value - low) / (high - low) < 0.8


def test_manifolds_on_a_line() -> None:
    # Radii to the nearest other: 1, 1, 4 (from 5 to 1).
    real = np.array([[0.0], [1.0], [5.0]])
    generated = np.array([[-1.0], [2.5], [8.9], [9.1]])
    assert in_manifold(generated, real, 1).tolist() == [True, True, True, False]
    assert in_manifold(np.array([[-1.1], [-0.9]]), real, 1).tolist() == [False, True]


def test_manifolds_by_loops() -> None:
    generated, real = _features(7, 30, 3, 0.8), _features(8, 25, 3)
    expected = []
    for x in generated:
        inside = False
        for index, y in enumerate(real):
            others = sorted(math.dist(y, z) for other, z in enumerate(real) if other != index)
            inside |= math.dist(x, y) <= others[2]
        expected.append(inside)
    assert in_manifold(generated, real).tolist() == expected
    assert 0 < sum(expected) < 30


def test_a_manifold_needs_neighbours() -> None:
    with pytest.raises(ValueError, match="3 pictures have no 3"):
        in_manifold(_features(0, 5, 2), _features(1, 3, 2))


def test_diversity_is_among_the_pictures_of_a_prompt() -> None:
    features = np.array([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0], [0.0, 8.0], [7.0, 7.0]])
    distances = diversity(features, ["coat", "coat", "bag", "coat", "dress"])
    # Distances among the coats: 5, 8 and 5.
    assert distances[[0, 1, 3]] == pytest.approx([6.5, 5.0, 6.5])
    assert np.isnan(distances[[2, 4]]).all()


def test_features_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        gaussian_of(np.array([[1.0, np.nan], [1.0, 2.0]]))
