"""How near a set of generated pictures is to a set of real ones, by the features that a classifier gives of each.

n: generated pictures, m: real ones, d: features.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from compress.numerics.statistics import Estimate, Floats

_CHUNK = 1024
"""Rows whose distances are held at once."""
_SINGULAR = 1e-10
"""Below this share of the largest, an eigenvalue is taken for 0."""


class Gaussian(NamedTuple):
    """The mean [d] and the covariance [d, d] of features."""

    mean: Floats
    covariance: Floats


def gaussian_of(features: ArrayLike) -> Gaussian:
    """Of features [n, d], the covariance divided by n - 1. Raises `ValueError` for fewer than two, or not finite."""
    rows = _rows(features)
    return Gaussian(rows.mean(axis=0), np.atleast_2d(np.cov(rows, rowvar=False)))


def frechet(first: Gaussian, second: Gaussian) -> float:
    """The squared Fréchet distance of two normal distributions (Dowson and Landau 1982).

    |m - w|² + tr(C + S - 2 (C S)^½), the root's trace being that of (C^½ S C^½)^½, which is symmetric.
    """
    root = _power(second.covariance, 0.5)
    middle = np.linalg.eigvalsh(root @ first.covariance @ root)
    between = float(np.square(first.mean - second.mean).sum())
    traces = float(np.trace(first.covariance) + np.trace(second.covariance))
    return max(between + traces - 2 * float(np.sqrt(np.maximum(middle, 0)).sum()), 0.0)


def frechet_distance(features: ArrayLike, reference: ArrayLike) -> float:
    """Fréchet Inception distance of Heusel et al. (2017, equation 6), in another network's features [n, d], [m, d].

    Few pictures lie further off than many of the same distribution, so that only distances of equally many compare.
    """
    return frechet(gaussian_of(features), gaussian_of(reference))


def frechet_interval(
    features: ArrayLike, reference: ArrayLike, seed: int, resamples: int = 200, confidence: float = 0.95
) -> Estimate:
    """`frechet_distance` with its bootstrap interval over the generated pictures.

    A resample of n pictures lies further off than they do, as they lie further off than what they are drawn from
    (Efron and Tibshirani 1993, chapter 10); the percentiles are moved by their own mean's excess, so that the interval
    lies about the distance.
    """
    rows, real = _rows(features), gaussian_of(reference)
    generator = np.random.default_rng(seed)
    drawn = generator.integers(0, len(rows), (resamples, len(rows)))
    values = np.array([frechet(gaussian_of(rows[chosen]), real) for chosen in drawn])
    value = frechet(gaussian_of(rows), real)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2]) - (values.mean() - value)
    return Estimate(value, min(value, max(float(low), 0.0)), max(value, float(high)))


def frechet_shares(features: ArrayLike, reference: ArrayLike) -> Floats:
    """What each generated picture adds to the Fréchet distance, [n]: their mean is the distance itself.

    It is linear in how often a picture is drawn, to the first order, so that two models' distances can be paired
    picture by picture (the influence function; Hampel 1974). With T = C^½ (C^½ S C^½)^-½ C^½, the map that carries
    the generated normal distribution (w, S) to the real one (m, C), the distance changes by 2 (w - m)·(x - w) +
    (x - w)ᵀ(I - T)(x - w) - tr((I - T) S) with the share of the picture x. Raises `ValueError` for no more pictures
    than features, of which that is not known.
    """
    rows, real = _rows(features), gaussian_of(reference)
    count, width = rows.shape
    if count <= width:
        raise ValueError(f"{count} pictures say nothing of how each bears on the distance in {width} features")
    own = gaussian_of(rows)
    root = _power(real.covariance, 0.5)
    carries = root @ _power(root @ own.covariance @ root, -0.5) @ root
    apart = np.eye(width) - carries
    away = rows - own.mean
    spread = count / (count - 1) * np.einsum("nd,de,ne->n", away, apart, away)
    found: Floats = frechet(own, real) + 2 * away @ (own.mean - real.mean) + spread - np.trace(apart @ own.covariance)
    return found


def in_manifold(features: ArrayLike, reference: ArrayLike, neighbours: int = 3) -> NDArray[np.bool_]:
    """Which features [n, d] lie within a ball about one of ``reference`` [m, d] that reaches its k-th neighbour, [n].

    Of generated pictures among real ones their mean is precision, of real ones among generated it is recall
    (Kynkäänniemi et al. 2019, section 2). Both depend on how many there are: take as many of one as of the other.
    Raises `ValueError` for no more of ``reference`` than ``neighbours``.
    """
    rows, known = _rows(features), _rows(reference)
    if not 1 <= neighbours < len(known):
        raise ValueError(f"{len(known)} pictures have no {neighbours} neighbours each")
    # The first is each of them itself.
    radii = np.concatenate(
        [np.partition(_squared(part, known), neighbours, axis=1)[:, neighbours] for part in _chunks(known)]
    )
    return np.concatenate([(_squared(part, known) <= radii).any(axis=1) for part in _chunks(rows)])


def diversity(features: ArrayLike, prompts: Sequence[Hashable]) -> Floats:
    """How far each picture is from the others of its prompt on the average, [n]; NaN where it has none."""
    rows = _rows(features)
    places: dict[Hashable, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    found = np.full(len(rows), np.nan)
    for chosen in places.values():
        if len(chosen) > 1:
            distances = np.sqrt(_squared(rows[chosen], rows[chosen]))
            np.fill_diagonal(distances, 0.0)
            found[chosen] = distances.sum(axis=1) / (len(chosen) - 1)
    return found


def _power(matrix: Floats, exponent: float) -> Floats:
    """Of a symmetric matrix without negative eigenvalues; those that are 0 stay so."""
    values, vectors = np.linalg.eigh(matrix)
    known = values > _SINGULAR * max(values[-1], 0)
    powers = np.where(known, np.where(known, values, 1.0) ** exponent, 0.0)
    found: Floats = (vectors * powers) @ vectors.T
    return found


def _squared(first: Floats, second: Floats) -> Floats:
    """Squared Euclidean distances, [n, m]."""
    from scipy.spatial.distance import cdist

    found: Floats = cdist(first, second, "sqeuclidean")
    return found


def _chunks(rows: Floats) -> list[Floats]:
    return [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]


def _rows(features: ArrayLike) -> NDArray[np.float64]:
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2:
        raise ValueError(f"expected features of two pictures or more, found {list(rows.shape)}")
    if not np.isfinite(rows).all():
        raise ValueError("features hold NaN or infinity")
    return rows
