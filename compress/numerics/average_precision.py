"""Average precision with the influence of each image, for intervals and paired comparisons."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def precision_influence(
    scores: Floats, right: NDArray[np.bool_], owners: NDArray[np.int64], objects: NDArray[np.int64]
) -> tuple[float, Floats]:
    """Return the average precision A of one class, and n dA/dw of each image's weight w at 1, [n].

    A is the area below precision as a function of recall, made monotonically decreasing: A = sum over correct
    detections k of max over j >= k of P_j, divided by the number of objects, with P_j = C_j / (C_j + F_j) and C and F
    the correct and wrong detections up to j. A weight applies to all objects and detections of an image. A does not
    change when all weights are scaled, so the influences sum to 0 (Euler). A + influence has the mean A and, to first
    order, the variance of A (infinitesimal jackknife: Jaeckel 1972; Efron 1982, chapter 6).

    Args:
        scores: Scores of all detections [d].
        right: Correctness of the detections [d].
        owners: Index of the image of each detection [d].
        objects: Number of objects in each image [n].

    Raises:
        ValueError: If there are no objects.
    """
    total, pictures = objects.sum(), len(objects)
    if not total > 0:
        raise ValueError("expected at least one object")
    if not len(scores):
        return 0.0, np.zeros(pictures)
    # Rank detections by score.
    order = np.argsort(-scores, kind="stable")
    hit, owner = right[order].astype(np.float64), owners[order]
    correct, ranks = np.cumsum(hit), np.arange(1, len(hit) + 1, dtype=np.float64)
    precision = correct / ranks
    # The place of the best precision from each rank on; of equal ones the last, whatever lies between.
    reached = len(hit) - 1 - _last_maxima(precision[::-1])[::-1]
    # Interpolated precision at each rank.
    best = precision[reached]
    area = float((hit * best).sum() / total)
    # How often the area uses the precision of each rank.
    reads = np.bincount(reached, weights=hit / total, minlength=len(hit)) / ranks**2
    # A right detection up to j raises P_j by F_j / (C_j + F_j)^2, a wrong one lowers it by C_j / (C_j + F_j)^2.
    gain = np.cumsum((reads * (ranks - correct))[::-1])[::-1]
    loss = np.cumsum((reads * correct)[::-1])[::-1]
    contributions = hit * best / total + hit * gain - (1 - hit) * loss
    # Sum the contributions of each image and subtract its share of the objects.
    sums = np.bincount(owner, weights=contributions, minlength=pictures)
    influence: Floats = pictures * (sums - area * objects / total)
    return area, influence


def _last_maxima(values: Floats) -> NDArray[np.int64]:
    """Return for each position the latest position up to it that set a new maximum."""
    highest = np.maximum.accumulate(values)
    new = np.r_[True, highest[1:] > highest[:-1]]
    positions: NDArray[np.int64] = np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))
    return positions
