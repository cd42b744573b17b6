"""What recipes promise that nobody has trained in full: how much better, how likely, for how many seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import Protocol

import numpy as np

from compress.numerics.statistics import Estimate
from compress.plugins.search.goal import is_dominated, limit_name
from compress.plugins.search.ledger import PastTrial
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import TrialOutcome
from compress.plugins.search.parameters import SearchParameter
from compress.plugins.search.proxy_metric import order_by_divergence
from compress.plugins.search.space import Point
from compress.plugins.search.surrogate import Surrogate
from compress.plugins.search.warm_start import DISCREPANCY, SHARED, TransferPrior, fit_with_prior
from compress.recipe.recipe import Limit

_FEWEST_KNOWN = 3
_SAME, _APART, _NO_GAIN = 0.001, 0.02, 1e-4
"""Of a figure that only trials tell, relative: how far two trials of one recipe may differ, by how much recipes do, one
standard deviation, while few are known, and a gain that is none."""
_FEWEST_WEIGHED, _WEIGHED_APART = 2, 0.3
"""The same of times and sizes that nothing foretells and a limit is on: how many have to be known, and the deviation of
recipes' logarithms."""
_LEAST = 1e-12
"""A chance that is none."""
_PLAINLY = 5
"""Beyond so many times what recipes differ by, or can be told apart by, a miss says no more than that it is one.

Otherwise a single recipe that came to nothing makes the process expect differences as large everywhere (Eriksson and
Poloczek 2021, section 3.3, warp constraints for that reason).
"""
_LIKELY = 0.8
"""The probability from which a limit on what is predicted is taken to be kept."""
_GLANCE = 0.25
"""How far arithmetic may be off, relative, before anything is excluded by it alone."""


class CostModel(Protocol):
    """What has to be known of costs (`CostEstimator`, or a table)."""

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float: ...
    def remaining(self, point: Point, share: float = 1.0) -> Mapping[str, float]: ...
    def total_seconds(self, point: Point, share: float = 1.0) -> float: ...
    def predict(self, point: Point, metric: str) -> float | None: ...
    def predict_analytically(self, point: Point, metric: str) -> float | None: ...
    def tolerance(self, point: Point, metric: str) -> float: ...
    def family(self, point: Point) -> tuple[object, ...]: ...
    def update(self, point: Point, share: float, outcome: TrialOutcome) -> None: ...


@dataclass(frozen=True)
class Expectation:
    """What a recipe promises before it is trained in full.

    ``gain`` is a share of the first trial's figure, None before there is one to compare with; ``chance`` that every
    limit on quality is kept, None before enough is known; ``seconds`` are those that are left to do.
    """

    gain: float | None
    probability: float | None
    seconds: float


class Acquisition:
    """By what is known at the beginning of a round."""

    def __init__(
        self, known: Observations, costs: CostModel, parameters: Sequence[SearchParameter], shares: tuple[float, ...],
        past: Sequence[PastTrial] = (),
    ) -> None:  # fmt: skip
        self.observations, self.costs, self.shares = known, costs, shares
        self._ranks = [parameter.ranks() for parameter in parameters]
        # What is done to a model that is trained already, and the bytes that it saves, move quality less than training.
        self._lesser = [
            *(parameter.is_after_training for parameter in parameters),
            any(parameter.is_after_training for parameter in parameters),
            False,
            False,
        ]
        self._start = known.initial_objectives()
        self._front = [known.feasible[point] for point in known.pareto_front()]
        first = known.finished.get(known.origin)
        self._baseline = {} if first is None else first.baseline
        self._prior = TransferPrior(past, self._features)
        self._gains: dict[Point, float] = {}
        self._foretold: dict[Point, float] = {}
        self._weighed: dict[str, Surrogate | None] = {}
        self._processes: dict[str, tuple[Surrogate, float]] = {}
        self.expected: dict[Point, Expectation] = {}
        """Of every point that `by_worth` was asked about."""

    def rank(self, points: Iterable[Point]) -> list[Point]:
        """Points that aren't trained in full, most worth first.

        That is gain x the probability that every limit is kept, for each second until it is trained in full. Where
        quality cannot tell recipes apart that went as far, their divergence from the baseline does.
        """
        worth, found, came_to = {}, list(points), self.observations.last_rungs()
        rungs = [(point, came_to.get(point, -1) + 1) for point in found]
        alone, surer = self._chances(found)
        self._foretell(found)
        # What is cheap tells little while nothing is known to keep the limits (Lee et al. 2020, on cost-cooling).
        cost = 1.0 if self._front else 0.5
        chances = order_by_divergence(self.observations, rungs, alone, self.costs.family)
        for point, chance, more in zip(found, chances, surer, strict=True):
            seconds = self.costs.marginal_seconds(point)
            gain = self.gain(point)
            worth[point] = chance * more * self._chance_foretold(point) * gain / max(seconds, 1e-3) ** cost
            self.expected[point] = Expectation(
                gain if self._start is not None and self._front else None, chance if self._is_judged else None, seconds
            )
        return sorted(worth, key=lambda point: (-worth[point], point))

    def gain(self, point: Point) -> float:
        """By how much of the first trial's figures it would be better than what is best now; 1 before that is known.

        What nothing foretells is expected by what others came to.
        """
        if point not in self._gains:
            self._gains[point] = self._gained(point)
        return self._gains[point]

    def _gained(self, point: Point) -> float:
        hoped = [self._hoped(point, metric) for metric in self.observations.goal.minimize]
        start, front = self._start, self._front
        if start is None or not front:
            return 1.0
        if None in hoped:
            return self._expected_gain(point) if len(hoped) == 1 else 1.0
        values = [value for value in hoped if value is not None]
        if len(values) == 1:
            return (min(best for (best,) in front) - values[0]) / (start[0] or 1.0)
        if is_dominated(values, front):
            return 0.0
        nearest = min(
            max((b - a) / (base or 1.0) for a, b, base in zip(values, best, start, strict=True)) for best in front
        )
        return max(nearest, 1e-9)

    def _expected_gain(self, point: Point) -> float:
        """The same of one figure that only a trial tells; 0 where next to nothing is expected of it."""
        if self._figures is None:
            return 1.0
        process, best = self._figures
        found = float(process.expected_improvement(np.array([self._features(point, self.shares[-1])]), best)[0])
        return found if found > _NO_GAIN else 0.0

    @cached_property
    def _figures(self) -> tuple[Surrogate, float] | None:
        """The only figure to minimize, as logarithms with the sign changed, and the best; None while few know it."""
        known = self.observations
        found = {
            key: values[0] for key, one in known.outcomes.items() if (values := known.goal.objectives(one)) is not None
        }
        if len(found) < _FEWEST_KNOWN or min(found.values()) <= 0:
            return None
        features = np.array([self._features(point, self.shares[rung]) for point, rung in found])
        values = -np.log(np.array(list(found.values())))
        process = Surrogate.fit(features, values, np.full(len(values), _SAME), _APART)
        return process, -math.log(min(best for (best,) in self._front))

    def may_meet_limits(self, point: Point) -> bool:
        """Whether predictions leave open that every limit on what is predicted is kept.

        What is plainly out of reach costs nobody a graph.
        """
        limits = self.observations.goal.limits
        if not all(
            self._leaves_open(one, self.costs.predict_analytically(point, one.metric), _GLANCE) for one in limits
        ):
            return False
        return all(self._may_keep(limit, point) for limit in limits)

    def _may_keep(self, limit: Limit, point: Point) -> bool:
        value = self._hoped(point, limit.metric)
        return self._leaves_open(limit, value, self.costs.tolerance(point, limit.metric))

    def _leaves_open(self, limit: Limit, value: float | None, tolerance: float) -> bool:
        """Whether a value that may be off by so much leaves open that a limit is kept."""
        ratio = self._ratio(limit, value)
        if ratio is None:
            return True
        return ratio * (1 + tolerance) >= 1 if limit.at_least is not None else ratio * (1 - tolerance) <= 1

    def likely_meets_limits(self, point: Point) -> bool:
        """Whether every limit on what is predicted is likely to be kept."""
        return self._chance_foretold(point) >= _LIKELY

    def _chance_foretold(self, point: Point) -> float:
        """The probability to keep every limit but those on quality; a tolerance is two standard deviations.

        Of what nothing foretells it goes by what the trials so far came to.
        """
        self._foretell([point])
        return self._foretold[point]

    def _foretell(self, points: Sequence[Point]) -> None:
        new = [point for point in points if point not in self._foretold]
        chances = np.ones(len(new))
        for limit in self.observations.goal.limits:
            within = [self._chance_within(limit, point) for point in new]
            chances *= [1.0 if chance is None else chance for chance in within]
            unknown = [place for place, chance in enumerate(within) if chance is None]
            process = self._tried(limit) if unknown and limit not in self.observations.goal.quality_limits else None
            if process is not None:
                features = np.array([self._features(new[place], self.shares[-1]) for place in unknown])
                chances[unknown] *= process.probability_at_least(features, np.zeros(len(unknown)))
        self._foretold |= dict(zip(new, chances.tolist(), strict=True))

    def _tried(self, limit: Limit) -> Surrogate | None:
        """By how much recipes keep a limit, as logarithms; None while few are known."""
        name = limit_name(limit)
        if name not in self._weighed:
            found = {
                point: math.log(ratio) * (1 if limit.at_least is not None else -1)
                for point, one in self.observations.finished.items()
                if (ratio := self._ratio(limit, one.final.get(limit.metric)))
            }
            features = np.array([self._features(point, self.shares[-1]) for point in found])
            known = len(found) >= _FEWEST_WEIGHED
            values, deviations = np.array(list(found.values())), np.full(len(found), _APART)
            self._weighed[name] = Surrogate.fit(features, values, deviations, _WEIGHED_APART) if known else None
        return self._weighed[name]

    def _chance_within(self, limit: Limit, point: Point) -> float | None:
        ratio = self._ratio(limit, self._hoped(point, limit.metric))
        if not ratio:
            return None
        room = math.log(ratio) if limit.at_least is not None else -math.log(ratio)
        return NormalDist(sigma=max(self.costs.tolerance(point, limit.metric) / 2, 1e-9)).cdf(room)

    def _ratio(self, limit: Limit, value: float | None) -> float | None:
        """A value as a share of what a limit allows; None where one of them is unknown."""
        other = 1.0 if limit.of is None else self._baseline.get(limit.metric)
        return None if value is None or not other else value / other / limit.bound

    def _hoped(self, point: Point, metric: str) -> float | None:
        """What a figure will be: as it was measured on the way, where training doesn't change it; else as predicted."""
        found = self.observations.measured_value(point, metric)
        return self.costs.predict(point, metric) if found is None else found

    @property
    def _is_judged(self) -> bool:
        """Whether enough is known of quality to say how likely a limit is kept."""
        return bool(self.observations.goal.quality_limits) and len(self.observations.margins) >= _FEWEST_KNOWN

    def _chances(self, points: Sequence[Point]) -> tuple[list[float], list[float]]:
        """The probability of each point to keep every limit on quality as surely as is wanted, trained in full.

        While none is known that surely keeps them, the surest whose figures do is what will be picked: then it is that
        to lie further inside than the pick, and the second list says by how much a point does that lies so, of what it
        takes to be sure; otherwise it says 1.
        """
        found, surer = np.ones(len(points)), np.ones(len(points))
        asked = np.array([self._features(point, self.shares[-1]) for point in points])
        for limit in self.observations.goal.quality_limits if points else ():
            name = limit_name(limit)
            rooms = self._rooms(name)
            halves = np.array([room.value - room.low for _, room in rooms])
            wanted = float(np.median(halves)) if rooms else 0.0
            if len(rooms) < _FEWEST_KNOWN:
                before = self._prior.chances(name, asked, wanted)
                found *= 1.0 if before is None else before
                continue
            prior = self._prior.get(name)
            if name not in self._processes:
                deepest = _PLAINLY * max(wanted, DISCREPANCY)
                values = np.array(
                    [
                        room.value if rung < self.observations.full_rung else max(room.value, -deepest)
                        for (_, rung), room in rooms
                    ]
                )
                features = np.array([self._features(point, self.shares[rung]) for (point, rung), _ in rooms])
                deviations = np.maximum(halves / SHARED, 1e-4)
                self._processes[name] = fit_with_prior(prior, features, values, deviations, self._lesser)
            rest, share = self._processes[name]
            expected = np.zeros(len(points)) if prior is None else share * prior.mean(asked)
            room = (wanted if self._front else self._open_room(name)) - expected
            chances = rest.probability_at_least(asked, room)
            if not self._front:
                surer *= rest.expected_improvement(asked, room) / np.maximum(chances, _LEAST) / max(wanted, _LEAST)
            found *= chances
        return [max(float(chance), _LEAST) for chance in found], surer.tolist()

    def _open_room(self, name: str) -> float:
        """How far inside a limit a recipe has to lie to be picked where none keeps all limits surely."""
        pick = self.observations.pick()
        room = None if pick is None else self.observations.margins[pick, self.observations.full_rung][name]
        return 0.0 if room is None else room.value

    def _rooms(self, name: str) -> list[tuple[tuple[Point, int], Estimate]]:
        """How far inside a limit recipes lie, after whatever share of their training."""
        return [(key, room) for key, own in self.observations.margins.items() if (room := own[name]) is not None]

    def _features(self, point: Point, share: float) -> list[float]:
        """A point's coordinates, its predicted size, seconds and share of training, each about between 0 and 1.

        Of seconds more tells than of choices: a ninth of twelve epochs is less than three.
        """
        size, start = (self.costs.predict(each, "size_bytes") for each in (point, self.observations.origin))
        ratio = size / start if size and start else 1.0
        lowest = math.log(self.shares[0]) if len(self.shares) > 1 else -1.0
        places = [rank[place] for rank, place in zip(self._ranks, point, strict=True)]
        longer = self.costs.total_seconds(point, share) / self.costs.total_seconds(self.observations.origin)
        return [*places, math.log(ratio), math.log(longer) / 2, math.log(share) / lowest]
