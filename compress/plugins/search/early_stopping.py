"""Whether a recipe may be given up before it is trained in full."""

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
"""Recipes by which it is known how much of an early gap lasts, and what is taken before there are any."""


def early_stopping_reason(
    known: Observations, point: Point, rung: int, shares: tuple[float, ...], family: Callable[[Point], object]
) -> str:
    """Why a recipe will not keep a limit, by how it stands to its family after as much training; else nothing.

    What its kin came to in full, and its gap to them now as far as gaps of others lasted, say row by row where it will
    come to; what parts recipes early parts them less when all is learned. It goes where the upper end of that interval
    misses the limit. The error that is allowed for is split over the limits, the rungs and the looks at each of them
    (Bonferroni): the first kin, two, four and so on are looked at, and the k-th look has 1 / (k (k + 1)) of it, so that
    a recipe that keeps its limits is given up with a probability of at most 1 - confidence, however often it is looked
    at.
    """
    own, goal = known.outcomes[point, rung], known.goal
    kin = [other for other in _ended(known, rung) if family(other) == family(point)]
    if not kin:
        return ""
    look = int(math.log2(len(kin))) + 1
    kin = kin[: 2 ** (look - 1)]
    allowed = (1 - goal.confidence) / (max(len(shares) - 1, 1) * max(len(goal.quality_limits), 1) * look * (look + 1))
    for limit in goal.quality_limits:
        lasting = _lasting(known, limit, rung)
        pairs = [(known.outcomes[other, rung], known.finished[other]) for other in kin]
        found = _landing(limit, own, pairs, lasting, allowed)
        if found is not None and found.high < 0:
            return (
                f"{limit_name(limit)}: by {shares[rung]:.0%} of training, and {len(kin)} of its family trained in full, it "
                f"would end {found.value:+.1%} inside, at most {found.high:+.1%}"
            )
    return ""


def _landing(
    limit: Limit, own: TrialOutcome, kin: Sequence[tuple[TrialOutcome, TrialOutcome]], lasting: float, error: float
) -> Estimate | None:
    """How far inside a limit a recipe will end, as a share of the bound, by ``kin`` after as much training and in full.

    Its ends are passed with a probability of ``error`` each. None where outcomes of rows aren't kept.
    """
    early, ended = ([_rows(one, FINAL, limit) for one in column] for column in zip(*kin, strict=True))
    base = _rows(kin[0][1], BASELINE, limit) if limit.of is not None else None
    every = [_rows(own, FINAL, limit), *early, *ended, *([base] if limit.of is not None else [])]
    rows = [one for one in every if one is not None]
    if len(rows) < len(every) or len({len(one) for one in rows}) > 1 or len(rows[0]) < 2:
        return None
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
    half = NormalDist().inv_cdf(1 - error) * float(inside.std(ddof=1)) / math.sqrt(len(inside))
    middle = float(inside.mean())
    return Estimate(middle, middle - half, middle + half)


def _rows(outcome: TrialOutcome, model: str, limit: Limit) -> Floats | None:
    found = outcome.measurement(model, limit.metric)
    return None if found is None or found.raw is None else np.asarray(found.raw, dtype=np.float64)


def _ended(known: Observations, rung: int) -> list[Point]:
    """Recipes that were looked at after that rung and trained in full."""
    return [point for point in known.finished if (point, rung) in known.margins]


def _lasting(known: Observations, limit: Limit, rung: int) -> float:
    """How much of a gap in quality after that rung is left when all is learned: a slope through 0, at most 1."""
    name, pairs = limit_name(limit), []
    for one, other in itertools.combinations(_ended(known, rung)[-_REMEMBERED:], 2):
        rooms = [known.margins[point, at][name] for at in (rung, known.full_rung) for point in (one, other)]
        early = [room.value for room in rooms if room is not None]
        if len(early) == len(rooms):
            pairs.append((early[0] - early[1], early[2] - early[3]))
    across = sum(before * before for before, _ in pairs)
    if len(pairs) < _FEWEST_PAIRS or not across:
        return _LASTING
    return min(max(sum(before * after for before, after in pairs) / across, 0.0), 1.0)
