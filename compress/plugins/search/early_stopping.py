"""Early stopping: whether a partly trained recipe would miss a limit when trained in full."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from compress.numerics.statistics import Estimate
from compress.plugins.search.goal import limit_name
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import TrialOutcome
from compress.plugins.search.space import Point
from compress.plugins.search.surrogate import Floats
from compress.recipe.recipe import Limit
from compress.results.metrics import describe_metric
from compress.results.report import BASELINE, FINAL

_FEWEST_PAIRS = 3
_REMEMBERED, _LASTING = 12, 0.5
"""Persistence of early gaps before there are enough recipes, and recipes that it is estimated from."""


def early_stopping_reason(
    observations: Observations, point: Point, rung: int, shares: tuple[float, ...], family: Callable[[Point], object]
) -> str:
    """Return why a partly trained recipe would miss a limit; an empty string where it may meet all.

    The final quality is predicted row by row: the mean of recipes of the same family that were trained in
    full, plus the recipe's gap to them after as much training, times the share of such gaps that persisted.
    The recipe is stopped where the upper end of the interval of this prediction misses the limit. The error
    probability is split over limits, rungs and repeated looks (Bonferroni). Looks happen at 1, 2, 4, ...
    finished recipes of the family, and the k-th look gets 1 / (k (k + 1)) of the error. A recipe that would
    meet its limits is therefore stopped with a probability of at most 1 - confidence.

    Args:
        observations: All trials so far.
        point: Recipe that was trained in part.
        rung: Rung that it was trained to.
        shares: Share of training at each rung.
        family: Function that returns the family of a point.

    Returns:
        The reason, with the limit and the predicted margin.
    """
    outcome, goal = observations.outcomes[point, rung], observations.goal
    relatives = [other for other in _completed_after(observations, rung) if family(other) == family(point)]
    if not relatives:
        return ""
    look = int(math.log2(len(relatives))) + 1
    relatives = relatives[: 2 ** (look - 1)]
    allowed = (1 - goal.confidence) / (max(len(shares) - 1, 1) * max(len(goal.quality_limits), 1) * look * (look + 1))
    for limit in goal.quality_limits:
        persistence = _gap_persistence(observations, limit, rung)
        pairs = [(observations.outcomes[other, rung], observations.finished[other]) for other in relatives]
        predicted = _predict_final_margin(limit, outcome, pairs, persistence, allowed)
        if predicted is not None and predicted.high < 0:
            return (
                f"{limit_name(limit)}: by {shares[rung]:.0%} of training and {len(relatives)} trials of its family, "
                f"it would end {predicted.value:+.1%} inside, at most {predicted.high:+.1%}"
            )
    return ""


def _predict_final_margin(
    limit: Limit, own: TrialOutcome, kin: Sequence[tuple[TrialOutcome, TrialOutcome]], lasting: float, error: float
) -> Estimate | None:
    """Predict the final margin of a limit, as a share of the bound; None where outcomes of rows are not stored.

    Args:
        limit: Limit on quality.
        own: Outcome of the partly trained recipe.
        kin: Outcomes of each recipe of the family, after as much training and in full.
        lasting: Share of a gap that persists until training is complete.
        error: Probability with which each end of the interval is exceeded.
    """
    early, ended = ([_rows(values, FINAL, limit) for values in column] for column in zip(*kin, strict=True))
    base = _rows(kin[0][1], BASELINE, limit) if limit.of is not None else None
    every = [_rows(own, FINAL, limit), *early, *ended, *([base] if limit.of is not None else [])]
    rows = [values for values in every if values is not None]
    if len(rows) < len(every) or len({len(values) for values in rows}) > 1 or len(rows[0]) < 2:
        return None
    # Predict each row: mean of the finished relatives plus the gap that persists.
    final = rows[0] * lasting + np.mean(rows[1 + len(kin) : 1 + 2 * len(kin)], axis=0)
    final -= np.mean(rows[1 : 1 + len(kin)], axis=0) * lasting
    if describe_metric(limit.metric).exponential:
        # Logarithms of windows, whose differences are ratios of the figures.
        inside = final - math.log(limit.bound) - (0.0 if base is None else base)
    elif base is None:
        inside = final / limit.bound - 1
    else:
        inside = (final - limit.bound * base) / (limit.bound * float(base.mean()))
    inside = inside if limit.at_least is not None else -inside
    # The interval of the mean margin over rows is one-sided at both ends.
    half = NormalDist().inv_cdf(1 - error) * float(inside.std(ddof=1)) / math.sqrt(len(inside))
    middle = float(inside.mean())
    return Estimate(middle, middle - half, middle + half)


def _rows(outcome: TrialOutcome, model: str, limit: Limit) -> Floats | None:
    measurement = outcome.measurement(model, limit.metric)
    return None if measurement is None or measurement.raw is None else np.asarray(measurement.raw, dtype=np.float64)


def _completed_after(observations: Observations, rung: int) -> list[Point]:
    """Return the recipes that were evaluated at this rung and trained in full."""
    return [point for point in observations.finished if (point, rung) in observations.margins]


def _gap_persistence(observations: Observations, limit: Limit, rung: int) -> float:
    """Return the share of a gap in quality at this rung that remains in the end: a slope through 0, at most 1."""
    name, pairs = limit_name(limit), []
    for first, second in itertools.combinations(_completed_after(observations, rung)[-_REMEMBERED:], 2):
        rooms = [
            observations.margins[point, at][name] for at in (rung, observations.full_rung) for point in (first, second)
        ]
        early = [room.value for room in rooms if room is not None]
        if len(early) == len(rooms):
            pairs.append((early[0] - early[1], early[2] - early[3]))
    total = sum(early_gap * early_gap for early_gap, _ in pairs)
    if len(pairs) < _FEWEST_PAIRS or not total:
        return _LASTING
    return min(max(sum(early_gap * final_gap for early_gap, final_gap in pairs) / total, 0.0), 1.0)
