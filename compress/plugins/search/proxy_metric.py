"""How far a recipe's answers lie from the baseline's, which needs no labels and tells apart what quality can't yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from compress.numerics.next_token import divergence
from compress.pipeline.target_session import TargetSession
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import TrialOutcome, difference
from compress.plugins.search.space import Point
from compress.plugins.search.surrogate import Floats
from compress.results.measurement import Measurement
from compress.results.report import BASELINE, FINAL

DIVERGENCE = "kl_divergence"
PROXY_METRICS = (DIVERGENCE, "embedding_cosine", "agreement")
"""Metrics of a final model against the baseline whose rows are kept, the one that tells most first."""


def measure_divergence(session: TargetSession) -> list[Measurement]:
    """The Kullback-Leibler divergence of a final model's answers from the baseline's on each row, in nats.

    Of tasks whose answers are classes; others say in `Task.compare` how near two models are.
    """
    task = session.runner.inputs.task
    found = [task.probabilities(session.predictions[label].kept) for label in (BASELINE, FINAL)]
    teacher, student = found
    if teacher is None or student is None or teacher.shape != student.shape:
        return []
    tiny = np.finfo(np.float32).tiny
    apart = divergence(np.log(np.maximum(teacher, tiny)), np.log(np.maximum(student, tiny)))
    return [
        Measurement(
            model=FINAL, metric=DIVERGENCE, target=session.target.name, value=float(apart.mean()), unit="nats",
            n=len(apart), raw=tuple(float(one) for one in apart),
        )
    ]  # fmt: skip


def order_by_divergence(
    known: Observations, going: Sequence[tuple[Point, int]], chances: Sequence[float], family: Callable[[Point], object]
) -> list[float]:
    """The chances of recipes, each with the rung that it would go to, put into the order of their divergence.

    Two of a family that went as far change theirs where their quality cannot tell them apart, and the paired interval
    of how far they are from the baseline can: the nearer one has the better chance.
    """
    found = list(chances)
    groups: dict[object, list[int]] = {}
    for place, (point, rung) in enumerate(going):
        if (point, rung - 1) in known.margins:
            groups.setdefault((rung, family(point)), []).append(place)
    for (rung, _), places in ((key, value) for key, value in groups.items() if isinstance(key, tuple)):
        outcomes = {place: known.outcomes[going[place][0], rung - 1] for place in places}
        order = sorted(places, key=lambda place: -found[place])
        # As in sorting by exchange, which ends: each exchange puts two into the order of their means.
        for _ in order:
            for at in range(len(order) - 1):
                better, worse = order[at], order[at + 1]
                if found[better] > found[worse] and _nearer(known, outcomes[worse], outcomes[better]):
                    found[better], found[worse] = found[worse], found[better]
                    order[at], order[at + 1] = worse, better
    return found


def _nearer(known: Observations, one: TrialOutcome, other: TrialOutcome) -> bool:
    """Whether ``one`` surely lies nearer to the baseline than ``other``, and no limit on quality parts them."""
    confidence = known.goal.confidence
    for limit in known.goal.quality_limits:
        gap = difference(limit, one, other, confidence)
        if gap is None or not gap.low < 0 < gap.high:
            return False
    own, theirs = (_divergences(each) for each in (one, other))
    if own is None or theirs is None or len(own) != len(theirs) or len(own) < 2:
        return False
    gaps = theirs - own
    half = NormalDist().inv_cdf(confidence) * float(gaps.std(ddof=1)) / math.sqrt(len(gaps))
    return float(gaps.mean()) > half


def _divergences(outcome: TrialOutcome) -> Floats | None:
    """Of each row, larger the further apart; None where none is kept."""
    for metric in PROXY_METRICS:
        found = outcome.measurement(FINAL, metric)
        if found is not None and found.raw is not None:
            rows = np.asarray(found.raw, dtype=np.float64)
            return rows if metric == DIVERGENCE else 1 - rows
    return None
