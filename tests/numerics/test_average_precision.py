"""What each picture adds to average precision: against weights that are changed, and pictures that are left out."""

from __future__ import annotations

import numpy as np
import pytest

from compress.numerics.average_precision import precision_influence


def weighted(
    scores: np.ndarray, right: np.ndarray, owners: np.ndarray, objects: np.ndarray, weights: np.ndarray
) -> float:
    """The area below precision as a falling function of recall, rank by rank, each picture counted by its weight."""
    order = np.argsort(-scores, kind="stable")
    hits = actual = 0.0
    points = []
    for index in order:
        weight = weights[owners[index]]
        hits, actual = hits + weight * right[index], actual + weight
        points.append((hits / (objects * weights).sum(), hits / actual))
    area, original = 0.0, 0.0
    for rank, (recall, _) in enumerate(points):
        area += (recall - original) * max(precision for _, precision in points[rank:])
        original = recall
    return area


def problem(seed: int, pictures: int = 12) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    objects = chance.integers(0, 4, pictures)
    objects[0] = 2
    owners = np.repeat(np.arange(pictures), chance.integers(0, 5, pictures))
    right = chance.random(len(owners)) < 0.5
    for picture in range(pictures):  # no more right ones than there are
        reference = np.flatnonzero((owners == picture) & right)
        right[reference[objects[picture] :]] = False
    return chance.random(len(owners)), right, owners, objects


@pytest.mark.parametrize("seed", range(8))
def test_influence_is_the_slope_of_the_weighted_area(seed: int) -> None:
    scores, right, owners, objects = problem(seed)
    area, influence = precision_influence(scores, right, owners, objects)
    ones = np.ones(len(objects))
    assert area == pytest.approx(weighted(scores, right, owners, objects, ones), abs=1e-12)
    # Where two precisions are equal, which of them is the best depends on the way: the slope lies between both.
    below, above = (
        [
            (weighted(scores, right, owners, objects, ones + step * (np.arange(len(objects)) == picture)) - area) / step
            for picture in range(len(objects))
        ]
        for step in (-1e-6, 1e-6)
    )
    actual = influence / len(objects)
    assert (actual >= np.array(below) - 1e-5).all() and (actual <= np.array(above) + 1e-5).all()
    assert (np.abs(actual) > 1e-3).sum() > 3 and np.isclose(below, above, atol=1e-5).sum() > 2
    assert influence.sum() == pytest.approx(0, abs=1e-9)


def test_its_spread_is_that_of_other_draws_of_pictures() -> None:
    scores, right, owners, objects = problem(3, pictures=300)
    area, influence = precision_influence(scores, right, owners, objects)
    chance = np.random.default_rng(0)
    draws = [
        weighted_fast(scores, right, owners, objects, np.bincount(chance.integers(0, 300, 300), minlength=300))
        for _ in range(300)
    ]
    assert influence.std() / np.sqrt(300) == pytest.approx(np.std(draws), rel=0.15)
    assert area == pytest.approx(np.mean(draws), abs=0.02)


def weighted_fast(
    scores: np.ndarray, right: np.ndarray, owners: np.ndarray, objects: np.ndarray, weights: np.ndarray
) -> float:
    """The same as `weighted`, by arrays."""
    order = np.argsort(-scores, kind="stable")
    weight = weights[owners[order]]
    hits, actual = np.cumsum(weight * right[order]), np.cumsum(weight)
    precision = np.maximum.accumulate((hits / np.maximum(actual, 1))[::-1])[::-1]
    return float((np.diff(hits, prepend=0) * precision).sum() / (objects * weights).sum())


def test_nothing_found_and_nothing_there() -> None:
    none = np.zeros(0)
    area, influence = precision_influence(none, none.astype(bool), none.astype(int), np.array([1, 0]))
    assert area == 0 and influence.tolist() == [0, 0]
    with pytest.raises(ValueError, match="at least one object"):
        precision_influence(none, none.astype(bool), none.astype(int), np.array([0, 0]))
