"""Early stopping of partly trained recipes, and the proxy metric that orders them.

The search trains a recipe in rungs, which are rising shares of its full training (as in successive halving), and
evaluates it after each. A recipe is stopped at a rung if it would miss a limit when trained in full. The divergence of
its answers from the baseline's, which needs no labels, distinguishes recipes whose quality cannot be distinguished yet.

A point is a recipe of the search space. Recipes of one family are comparable when partly trained. A margin is the
distance from a limit as a share of its bound, and negative if the limit is missed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from compress.numerics.statistics import IntervalEstimate
from compress.numerics.token_metrics import divergence
from compress.pipeline.target_session import TargetSession
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import TrialOutcome, limit_name, mean_interval, paired_difference
from compress.plugins.search.space import Point
from compress.plugins.search.surrogate import Floats
from compress.recipe.recipe import Limit
from compress.results.metrics import describe_metric
from compress.results.report import BASELINE, FINAL, Measurement

_MIN_PAIRS = 3
"""Fewest pairs of finished recipes from which the persistence of gaps is estimated."""
_MAX_FINISHED, _DEFAULT_PERSISTENCE = 12, 0.5
"""Most finished recipes that persistence is estimated from, and the persistence before there are enough pairs."""


def early_stopping_reason(
    observations: Observations, point: Point, rung: int, shares: tuple[float, ...], family: Callable[[Point], object]
) -> str:
    """Return why a partly trained recipe would miss a limit; an empty string where it may meet all.

    The final quality is predicted for each row of the data: the mean of recipes of the same family that were trained
    in full, plus the recipe's gap to them after as much training, times the share of such gaps that persisted. The
    recipe is stopped where the upper end of the interval of this prediction misses the limit.

    The test is repeated as recipes of the family finish: looks (interim analyses) happen at 1, 2, 4, ... of them. The
    error probability 1 - confidence is split evenly over limits and rungs (Bonferroni), and the k-th look gets
    1 / (k (k + 1)) of it. A recipe that would meet its limits is therefore stopped with at most this probability.

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
    # Use exactly 1, 2, 4, ... finished relatives. Until their number has doubled, the test is the same as at the last
    # look, so that it has no further chance of stopping the recipe by error.
    look = int(math.log2(len(relatives))) + 1
    relatives = relatives[: 2 ** (look - 1)]
    # Spend 1 / (k (k + 1)) of the error on look k. These shares sum to 1. The last rung needs no test.
    error = (1 - goal.confidence) / (max(len(shares) - 1, 1) * max(len(goal.quality_limits), 1) * look * (look + 1))
    for limit in goal.quality_limits:
        persistence = _gap_persistence(observations, limit, rung)
        pairs = [(observations.outcomes[other, rung], observations.finished[other]) for other in relatives]
        predicted = _predict_final_margin(limit, outcome, pairs, persistence, error)
        if predicted is not None and predicted.high < 0:
            return (
                f"{limit_name(limit)}: by {shares[rung]:.0%} of training and {len(relatives)} trials of its family, "
                f"it would end {predicted.value:+.1%} inside, at most {predicted.high:+.1%}"
            )
    return ""


def _predict_final_margin(
    limit: Limit,
    partial: TrialOutcome,
    relatives: Sequence[tuple[TrialOutcome, TrialOutcome]],
    persistence: float,
    error: float,
) -> IntervalEstimate | None:
    """Predict the final margin of a limit, as a share of the bound; None if outcomes of rows are not stored.

    Args:
        limit: Limit on quality.
        partial: Outcome of the partly trained recipe.
        relatives: Outcomes of each recipe of the family, after as much training and in full.
        persistence: Share of a gap that persists until training is complete.
        error: Probability with which each end of the interval is exceeded.
    """
    metric = limit.metric
    early, finished = ([_rows(values, FINAL, metric) for values in column] for column in zip(*relatives, strict=True))
    # A relative limit is a factor of the baseline's quality.
    base = _rows(relatives[0][1], BASELINE, metric) if limit.of is not None else None
    columns = [_rows(partial, FINAL, metric), *early, *finished, *([base] if limit.of is not None else [])]
    rows = [values for values in columns if values is not None]
    # The prediction pairs rows, so all outcomes must be of the same rows.
    if len(rows) < len(columns) or len({len(values) for values in rows}) > 1 or len(rows[0]) < 2:
        return None
    # Predict each row: mean of the finished relatives plus the gap that persists. ``rows`` holds the recipe, the early
    # relatives, the finished relatives and the baseline, in this order.
    count = len(relatives)
    final = rows[0] * persistence + np.mean(rows[1 + count : 1 + 2 * count], axis=0)
    final -= np.mean(rows[1 : 1 + count], axis=0) * persistence
    if describe_metric(limit.metric).exponential:
        # The rows hold logarithms. Their difference is the logarithm of a ratio, which is near the relative margin.
        inside = final - math.log(limit.bound) - (0.0 if base is None else base)
    elif base is None:
        inside = final / limit.bound - 1
    else:
        inside = (final - limit.bound * base) / (limit.bound * float(base.mean()))
    return mean_interval(inside if limit.at_least is not None else -inside, 1 - error)


def _rows(outcome: TrialOutcome, model: str, metric: str) -> Floats | None:
    measurement = outcome.measurement(model, metric)
    return None if measurement is None or measurement.raw is None else np.asarray(measurement.raw, dtype=np.float64)


def _completed_after(observations: Observations, rung: int) -> list[Point]:
    """Return the recipes that were evaluated at this rung and trained in full."""
    return [point for point in observations.finished if (point, rung) in observations.margins]


def _gap_persistence(observations: Observations, limit: Limit, rung: int) -> float:
    """Return the share of a gap in quality at this rung that remains in the end, from 0 to 1.

    It is the slope of a regression through the origin of final gaps on early gaps of finished recipes.
    """
    name, pairs = limit_name(limit), []
    # Compare pairs of finished recipes: their gap at this rung and their gap in the end.
    for first, second in itertools.combinations(_completed_after(observations, rung)[-_MAX_FINISHED:], 2):
        # The margins of both at this rung come first, then those in the end.
        keys = itertools.product((rung, observations.full_rung), (first, second))
        margins = [observations.margins[point, trained_to][name] for trained_to, point in keys]
        values = [margin.value for margin in margins if margin is not None]
        if len(values) == len(margins):
            pairs.append((values[0] - values[1], values[2] - values[3]))
    squares = sum(early_gap * early_gap for early_gap, _ in pairs)
    if len(pairs) < _MIN_PAIRS or not squares:
        return _DEFAULT_PERSISTENCE
    return min(max(sum(early_gap * final_gap for early_gap, final_gap in pairs) / squares, 0.0), 1.0)


DIVERGENCE = "kl_divergence"
PROXY_METRICS = (DIVERGENCE, "embedding_cosine", "agreement")
"""Metrics that compare a final model with the baseline row by row, the most informative first."""


def measure_divergence(session: TargetSession) -> list[Measurement]:
    """Measure the Kullback-Leibler divergence from the baseline's class probabilities on each row, in nats.

    Returns nothing for tasks without class probabilities, whose proxy metric comes from `Task.compare`.
    """
    task, predictions = session.runner.inputs.task, session.predictions
    teacher, student = (task.probabilities(predictions[label].kept) for label in (BASELINE, FINAL))
    if teacher is None or student is None or teacher.shape != student.shape:
        return []
    # Keep the logarithm of a probability that underflowed to 0 finite.
    tiny = np.finfo(np.float32).tiny
    divergences = divergence(np.log(np.maximum(teacher, tiny)), np.log(np.maximum(student, tiny)))
    return [
        Measurement(
            model=FINAL, metric=DIVERGENCE, target=session.target.name, value=float(divergences.mean()), unit="nats",
            n=len(divergences), raw=tuple(float(value) for value in divergences),
        )
    ]  # fmt: skip


def order_by_divergence(
    observations: Observations,
    promotions: Sequence[tuple[Point, int]],
    probabilities: Sequence[float],
    family: Callable[[Point], object],
) -> list[float]:
    """Return the probabilities of recipes to meet their limits, ordered by divergence where quality decides nothing.

    Two recipes of a family at the same rung exchange their probabilities if their quality cannot be distinguished but
    their divergences can, by paired intervals: the one nearer to the baseline gets the higher probability.

    Args:
        observations: All trials so far.
        promotions: Recipes, each with the next rung that it would be trained to.
        probabilities: Probability of each recipe to meet its limits.
        family: Function that returns the family of a point.

    Returns:
        The probabilities in the order of ``promotions``.
    """
    exchanged = list(probabilities)
    # Indices of comparable recipes, by rung and family. Recipes that were not evaluated yet have no divergence.
    groups: dict[tuple[int, object], list[int]] = {}
    for index, (point, rung) in enumerate(promotions):
        if (point, rung - 1) in observations.margins:
            groups.setdefault((rung, family(point)), []).append(index)
    for (rung, _), indices in groups.items():
        outcomes = {index: observations.outcomes[promotions[index][0], rung - 1] for index in indices}
        order = sorted(indices, key=lambda index: -exchanged[index])
        # This is bubble sort. "Nearer" is no total order, since it requires significance, so `sorted` cannot be used.
        for _ in order:
            for position in range(len(order) - 1):
                better, worse = order[position], order[position + 1]
                if exchanged[better] > exchanged[worse] and _is_nearer(observations, outcomes[worse], outcomes[better]):
                    exchanged[better], exchanged[worse] = exchanged[worse], exchanged[better]
                    order[position], order[position + 1] = worse, better
    return exchanged


def _is_nearer(observations: Observations, first: TrialOutcome, second: TrialOutcome) -> bool:
    """Return whether ``first`` is significantly nearer to the baseline, and quality does not distinguish the two."""
    confidence = observations.goal.confidence
    for limit in observations.goal.quality_limits:
        gap = paired_difference(limit, first, second, confidence)
        # An interval without 0 means that quality distinguishes the recipes, so the divergence is not needed.
        if gap is None or not gap.low < 0 < gap.high:
            return False
    near, far = _divergences(first), _divergences(second)
    if near is None or far is None or len(near) != len(far) or len(near) < 2:
        return False
    return mean_interval(far - near, confidence).low > 0


def _divergences(outcome: TrialOutcome) -> Floats | None:
    """Return the divergence of each row, larger if further apart; None where none is stored."""
    for metric in PROXY_METRICS:
        rows = _rows(outcome, FINAL, metric)
        if rows is not None:
            # Cosine and agreement are 1 for equal models.
            return rows if metric == DIVERGENCE else 1 - rows
    return None
