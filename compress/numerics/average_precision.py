"""Average precision: how much each picture adds to it, so that it has an interval and two models can be paired."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def precision_influence(
    scores: Floats, right: NDArray[np.bool_], owners: NDArray[np.int64], objects: NDArray[np.int64]
) -> tuple[float, Floats]:
    """Average precision A of one class, and n dA/dw of each picture's weight w at 1, [n] for n pictures.

    ``scores`` [d] and ``right`` [d] are of all detections, ``owners`` [d] the picture of each, ``objects`` [n] how many
    there are to find in each. A is the area below precision as a function of recall, made to fall everywhere:
    A = sum over right detections k of max over j >= k of P_j, by the number of objects, P_j = C_j / (C_j + F_j) with C
    and F the right and the wrong ones up to j. Weights count all of a picture's objects and detections. A does not
    change when all weights grow alike, so these influences sum to 0 (Euler), and A + influence has the mean A and to
    the first order the variance of A (infinitesimal jackknife: Jaeckel 1972; Efron 1982, chapter 6). Raises
    `ValueError` where there is no object.
    """
    total, pictures = objects.sum(), len(objects)
    if not total > 0:
        raise ValueError("expected at least one object")
    if not len(scores):
        return 0.0, np.zeros(pictures)
    order = np.argsort(-scores, kind="stable")
    hit, owner = right[order].astype(np.float64), owners[order]
    found, ranks = np.cumsum(hit), np.arange(1, len(hit) + 1, dtype=np.float64)
    precision = found / ranks
    # The place of the best precision from each rank on; of equal ones the last, whatever lies between.
    reached = len(hit) - 1 - _last_maxima(precision[::-1])[::-1]
    best = precision[reached]
    area = float((hit * best).sum() / total)
    reads = np.bincount(reached, weights=hit / total, minlength=len(hit)) / ranks**2
    # A right detection up to j raises P_j by F_j / (C_j + F_j)^2, a wrong one lowers it by C_j / (C_j + F_j)^2.
    gain = np.cumsum((reads * (ranks - found))[::-1])[::-1]
    loss = np.cumsum((reads * found)[::-1])[::-1]
    each = hit * best / total + hit * gain - (1 - hit) * loss
    sums = np.bincount(owner, weights=each, minlength=pictures)
    influence: Floats = pictures * (sums - area * objects / total)
    return area, influence


def _last_maxima(values: Floats) -> NDArray[np.int64]:
    """For each place the first place up to it at which the running maximum was reached."""
    highest = np.maximum.accumulate(values)
    new = np.r_[True, highest[1:] > highest[:-1]]
    places: NDArray[np.int64] = np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))
    return places
