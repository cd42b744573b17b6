"""Proxy metric: divergence of a recipe's answers from the baseline's, which needs no labels.

It distinguishes partly trained recipes whose quality cannot be distinguished yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from compress.numerics.token_metrics import divergence
from compress.pipeline.target_session import TargetSession
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import TrialOutcome, paired_difference
from compress.plugins.search.space import Point
from compress.plugins.search.surrogate import Floats
from compress.results.report import BASELINE, FINAL, Measurement

DIVERGENCE = "kl_divergence"
PROXY_METRICS = (DIVERGENCE, "embedding_cosine", "agreement")
"""Metrics that compare a final model with the baseline row by row, the most informative first."""


def measure_divergence(session: TargetSession) -> list[Measurement]:
    """Measure the Kullback-Leibler divergence from the baseline's class probabilities on each row, in nats.

    Other tasks than classification compare models in `Task.compare`.
    """
    task = session.runner.inputs.task
    probabilities = [task.probabilities(session.predictions[label].kept) for label in (BASELINE, FINAL)]
    teacher, student = probabilities
    if teacher is None or student is None or teacher.shape != student.shape:
        return []
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
    going: Sequence[tuple[Point, int]],
    chances: Sequence[float],
    family: Callable[[Point], object],
) -> list[float]:
    """Return the probabilities of recipes, exchanged so that they follow the divergence where quality cannot.

    Two recipes of a family at the same rung exchange their probabilities where their quality cannot be
    distinguished but the paired interval of their divergences can: the one nearer to the baseline gets the
    higher probability.

    Args:
        known: All trials so far.
        going: Recipes, each with the rung that it would go to.
        chances: Probability of each recipe to meet its limits.
        family: Function that returns the family of a point.

    Returns:
        The probabilities in the order of ``going``.
    """
    ordered = list(chances)
    groups: dict[object, list[int]] = {}
    for index, (point, rung) in enumerate(going):
        if (point, rung - 1) in observations.margins:
            groups.setdefault((rung, family(point)), []).append(index)
    for (rung, _), indices in ((key, value) for key, value in groups.items() if isinstance(key, tuple)):
        outcomes = {index: observations.outcomes[going[index][0], rung - 1] for index in indices}
        order = sorted(indices, key=lambda index: -ordered[index])
        # As in sorting by exchange, which ends: each exchange puts two into the order of their means.
        for _ in order:
            for at in range(len(order) - 1):
                better, worse = order[at], order[at + 1]
                if ordered[better] > ordered[worse] and _nearer(observations, outcomes[worse], outcomes[better]):
                    ordered[better], ordered[worse] = ordered[worse], ordered[better]
                    order[at], order[at + 1] = worse, better
    return ordered


def _nearer(observations: Observations, first: TrialOutcome, second: TrialOutcome) -> bool:
    """Return whether ``first`` is significantly nearer to the baseline than ``second`` while no limit separates
    them.
    """
    confidence = observations.goal.confidence
    for limit in observations.goal.quality_limits:
        gap = paired_difference(limit, first, second, confidence)
        if gap is None or not gap.low < 0 < gap.high:
            return False
    first_divergences, second_divergences = (_divergences(outcome) for outcome in (first, second))
    if (
        first_divergences is None
        or second_divergences is None
        or len(first_divergences) != len(second_divergences)
        or len(first_divergences) < 2
    ):
        return False
    gaps = second_divergences - first_divergences
    half = NormalDist().inv_cdf(confidence) * float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    return float(gaps.mean()) > half


def _divergences(outcome: TrialOutcome) -> Floats | None:
    """Return the divergence of each row, larger if further apart; None where none is stored."""
    for metric in PROXY_METRICS:
        measurement = outcome.measurement(FINAL, metric)
        if measurement is not None and measurement.raw is not None:
            rows = np.asarray(measurement.raw, dtype=np.float64)
            return rows if metric == DIVERGENCE else 1 - rows
    return None
