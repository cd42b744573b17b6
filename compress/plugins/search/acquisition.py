"""Acquisition function: the expected gain per second of recipes that are not trained in full yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from statistics import NormalDist
from typing import Protocol

import numpy as np

from compress.plugins.search.early_stopping import order_by_divergence
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import TrialOutcome, is_dominated, limit_name
from compress.plugins.search.space import Point, SearchParameter
from compress.plugins.search.surrogate import Surrogate
from compress.recipe.recipe import Limit

_FEWEST_KNOWN = 3
_DISCREPANCY = 0.02
"""Smallest standard deviation between margins of recipes, since the first recipes may be alike."""
_HALF_WIDTHS_PER_DEVIATION = 2.56
"""Half-widths of a one-sided 90% interval in a standard deviation.

The number is doubled, since half of the error is common to all recipes.
"""
_SAME, _APART, _NO_GAIN = 0.001, 0.02, 1e-4
"""Relative constants for an objective that only trials measure.

Deviation of two trials of one recipe, deviation between recipes while few are measured, and a negligible gain.
"""
_FEWEST_WEIGHED, _WEIGHED_APART = 2, 0.3
"""Constants for limits on sizes and times that nothing predicts.

Smallest number of measured recipes, and standard deviation of the logarithm between recipes.
"""
_LEAST = 1e-12
"""Least probability."""
_CLIP_MULTIPLE = 5
"""Margins below this multiple of the usual half-width or deviation are clipped.

Otherwise a single bad recipe makes the process expect large differences everywhere (Eriksson and Poloczek 2021, section
3.3, warp constraints for that reason).
"""
_LIKELY = 0.8
"""Probability from which a predictable limit counts as likely to be met."""
_ANALYTIC_TOLERANCE = 0.25
"""Relative tolerance of analytic predictions before they exclude a recipe."""


class CostModel(Protocol):
    """Predictions of cost that the engine needs (`CostEstimator`, or recorded trials)."""

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
        """Return the time of the stages that no trial has run, and of the evaluation."""

    def remaining(self, point: Point, share: float = 1.0) -> Mapping[str, float]:
        """Return the time of each stage that no trial has run, by its key."""

    def total_seconds(self, point: Point, share: float = 1.0) -> float:
        """Return the time of all stages."""

    def predict(self, point: Point, metric: str) -> float | None:
        """Return a metric of the final model; None if it cannot be predicted."""

    def predict_analytically(self, point: Point, metric: str) -> float | None:
        """Return the prediction that needs no traced graph; None without one."""

    def tolerance(self, point: Point, metric: str) -> float:
        """Return the relative error that a prediction may have."""

    def family(self, point: Point) -> tuple[object, ...]:
        """Return a key of recipes that are comparable when partly trained."""

    def update(self, point: Point, share: float, outcome: TrialOutcome) -> None:
        """Record the outcome of a trial."""


@dataclass(frozen=True)
class Expectation:
    """Expected result of training a recipe in full.

    Attributes:
        gain: Improvement as a share of the first trial's objective; None before a recipe meets all limits.
        probability: Probability that every limit on quality is met; None before enough trials are complete.
        seconds: Predicted time of the stages that are not cached.
    """

    gain: float | None
    probability: float | None
    seconds: float


class Acquisition:
    """Acquisition function of one round of the search."""

    def __init__(
        self,
        observations: Observations,
        costs: CostModel,
        parameters: Sequence[SearchParameter],
        shares: tuple[float, ...],
    ) -> None:
        self.observations, self.costs, self.shares = observations, costs, shares
        self._ranks = [parameter.ranks() for parameter in parameters]
        # Stages after training, and the bytes that they save, change quality less than training does.
        late = [parameter.is_after_training for parameter in parameters]
        self._is_minor_feature = [*late, any(late), False, False]
        self._start = observations.initial_objectives()
        self._front = [observations.feasible[point] for point in observations.pareto_front()]
        first = observations.finished.get(observations.origin)
        self._baseline = {} if first is None else first.baseline
        self._gains: dict[Point, float] = {}
        self._predicted_chances: dict[Point, float] = {}
        self._margin_processes: dict[str, Surrogate | None] = {}
        self._objective_processes: dict[int, Surrogate | None] = {}
        self._processes: dict[str, Surrogate] = {}
        self.expected: dict[Point, Expectation] = {}
        """Expectation of every point that `rank` was called with."""

    def rank(self, points: Iterable[Point]) -> list[Point]:
        """Return points that are not trained in full, the best expected gain per second first.

        The value of a point is its gain, times the probability that every limit is met, divided by the time until
        it is trained in full. Where the quality of partly trained recipes cannot be distinguished, the divergence
        from the baseline orders their probabilities.
        """
        values, candidates, last_rungs = {}, list(points), self.observations.last_rungs()
        next_rungs = [(point, last_rungs.get(point, -1) + 1) for point in candidates]
        probabilities, safety = self._chances(candidates)
        self._predict_chances(candidates)
        # Cheap recipes teach little until one meets the limits, so time counts less (cost-cooling, Lee et al. 2020).
        exponent = 1.0 if self._front else 0.5
        chances = order_by_divergence(self.observations, next_rungs, probabilities, self.costs.family)
        predicts_quality = self.observations.goal.quality_limits and len(self.observations.margins) >= _FEWEST_KNOWN
        for point, chance, factor in zip(candidates, chances, safety, strict=True):
            seconds, gain = self.costs.marginal_seconds(point), self.gain(point)
            expected_gain = chance * factor * self._predicted_chances[point] * gain
            values[point] = expected_gain / max(seconds, 1e-3) ** exponent
            shown_gain = gain if self._start is not None and self._front else None
            self.expected[point] = Expectation(shown_gain, chance if predicts_quality else None, seconds)
        return sorted(values, key=lambda point: (-values[point], point))

    def gain(self, point: Point) -> float:
        """Return the predicted improvement over the best recipe so far, as a share of the first trial's objective.

        The gain is 1 until a recipe meets all limits. An objective that nothing predicts is extrapolated from the
        trials.
        """
        if point not in self._gains:
            self._gains[point] = self._predict_gain(point)
        return self._gains[point]

    def _predict_gain(self, point: Point) -> float:
        predictions = [self._measured_or_predicted(point, metric) for metric in self.observations.goal.minimize]
        start, front = self._start, self._front
        if start is None or not front:
            return 1.0
        values = list[float]()
        for position, value in enumerate(predictions):
            if value is None:
                # Only trials measure this objective, so it is extrapolated from them.
                process, features = self._objective_process(position), np.array([self._features(point, 1.0)])
                if process is None:
                    return 1.0
                if len(predictions) == 1:
                    # A negligible improvement counts as none.
                    best_value = -math.log(min(best for (best,) in front))
                    gain = float(process.expected_improvement(features, best_value)[0])
                    return gain if gain > _NO_GAIN else 0.0
                value = math.exp(-float(process.mean(features)[0]))
            values.append(value)
        # With one objective, the gain is the improvement over the best value.
        if len(values) == 1:
            return (min(best for (best,) in front) - values[0]) / (start[0] or 1.0)
        if is_dominated(values, front):
            return 0.0
        # With several objectives, the gain is the distance to the front: the smallest, over its recipes, of the largest
        # improvement in any objective.
        nearest = min(
            max((b - a) / (base or 1.0) for a, b, base in zip(values, best, start, strict=True)) for best in front
        )
        return max(nearest, 1e-9)

    def _objective_process(self, position: int) -> Surrogate | None:
        """Return a Gaussian process of the negative logarithm of an objective; None while few values are known."""
        if position not in self._objective_processes:
            observations, trials = self.observations, self.observations.outcomes.items()
            objectives_by_trial = {key: observations.goal.objectives(outcome) for key, outcome in trials}
            objectives = {key: values[position] for key, values in objectives_by_trial.items() if values is not None}
            self._objective_processes[position] = None
            if len(objectives) >= _FEWEST_KNOWN and min(objectives.values()) > 0:
                features = np.array([self._features(point, self.shares[rung]) for point, rung in objectives])
                # The process maximizes, and objectives such as sizes differ by factors.
                values = -np.log(np.array(list(objectives.values())))
                deviations = np.full(len(values), _SAME)
                self._objective_processes[position] = Surrogate.fit(features, values, deviations, _APART)
        return self._objective_processes[position]

    def may_meet_limits(self, point: Point) -> bool:
        """Return whether the predictions allow that every predictable limit is met.

        Analytic predictions come first, so that no graph is traced for a recipe that is far from its limits.
        """
        limits, costs = self.observations.goal.limits, self.costs
        analytic = (costs.predict_analytically(point, limit.metric) for limit in limits)
        if not all(map(self._may_meet, limits, analytic, repeat(_ANALYTIC_TOLERANCE))):
            return False
        predicted = (self._measured_or_predicted(point, limit.metric) for limit in limits)
        return all(map(self._may_meet, limits, predicted, (costs.tolerance(point, limit.metric) for limit in limits)))

    def _may_meet(self, limit: Limit, value: float | None, tolerance: float) -> bool:
        """Return whether a value with this relative tolerance may meet a limit."""
        ratio = self._ratio(limit, value)
        if ratio is None:
            return True
        return ratio * (1 + tolerance) >= 1 if limit.at_least is not None else ratio * (1 - tolerance) <= 1

    def likely_meets_limits(self, point: Point) -> bool:
        """Return whether every predictable limit is likely to be met."""
        self._predict_chances([point])
        return self._predicted_chances[point] >= _LIKELY

    def _predict_chances(self, points: Sequence[Point]) -> None:
        """Predict the probability that every limit on size and time is met.

        The tolerance of a prediction counts as two standard deviations. Limits that nothing predicts are
        extrapolated from the trials.
        """
        new = [point for point in points if point not in self._predicted_chances]
        chances = np.ones(len(new))
        for limit in self.observations.goal.limits:
            within = [self._chance_within(limit, point) for point in new]
            # Limits count as independent.
            chances *= [1.0 if chance is None else chance for chance in within]
            # The margins of finished recipes stand in for a limit without a prediction.
            unknown = [index for index, chance in enumerate(within) if chance is None]
            if not unknown or limit in self.observations.goal.quality_limits:
                continue
            if (process := self._margin_process(limit)) is not None:
                features = np.array([self._features(new[index], self.shares[-1]) for index in unknown])
                chances[unknown] *= process.probability_at_least(features, np.zeros(len(unknown)))
        self._predicted_chances |= dict(zip(new, chances.tolist(), strict=True))

    def _margin_process(self, limit: Limit) -> Surrogate | None:
        """Return a Gaussian process of the logarithmic margin of a limit; None while few recipes are measured."""
        name = limit_name(limit)
        if name not in self._margin_processes:
            margins = {
                point: math.log(ratio) * (1 if limit.at_least is not None else -1)
                for point, outcome in self.observations.finished.items()
                if (ratio := self._ratio(limit, outcome.final.get(limit.metric)))
            }
            features = np.array([self._features(point, self.shares[-1]) for point in margins])
            values, deviations = np.array(list(margins.values())), np.full(len(margins), _APART)
            self._margin_processes[name] = (
                Surrogate.fit(features, values, deviations, _WEIGHED_APART) if len(margins) >= _FEWEST_WEIGHED else None
            )
        return self._margin_processes[name]

    def _chance_within(self, limit: Limit, point: Point) -> float | None:
        ratio = self._ratio(limit, self._measured_or_predicted(point, limit.metric))
        if not ratio:
            return None
        room = math.log(ratio) if limit.at_least is not None else -math.log(ratio)
        return NormalDist(sigma=max(self.costs.tolerance(point, limit.metric) / 2, 1e-9)).cdf(room)

    def _ratio(self, limit: Limit, value: float | None) -> float | None:
        """Return a value divided by the bound of a limit; None where one of them is unknown."""
        other = 1.0 if limit.of is None else self._baseline.get(limit.metric)
        return None if value is None or not other else value / other / limit.bound

    def _measured_or_predicted(self, point: Point, metric: str) -> float | None:
        """Return the measured value of a metric that training does not change, else its prediction."""
        measured = self.observations.measured_value(point, metric)
        return self.costs.predict(point, metric) if measured is None else measured

    def _chances(self, points: Sequence[Point]) -> tuple[list[float], list[float]]:
        """Return the probability that each point meets every limit on quality, and a factor for safer points.

        Until one recipe meets all limits with confidence, the search picks the safest recipe whose measured values
        meet them. The probability is then that of a larger margin than the pick's, and the second list holds the
        expected improvement of the margin, as a share of the margin that confidence takes. Otherwise the second
        list is 1.
        """
        products, safety = np.ones(len(points)), np.ones(len(points))
        queried = np.array([self._features(point, self.shares[-1]) for point in points])
        # Take the margins of the present pick where no recipe meets all limits with confidence.
        pick = None if self._front else self.observations.pick()
        finished = {} if pick is None else self.observations.margins[pick, self.observations.full_rung]
        picked = {name: margin.value for name, margin in finished.items() if margin is not None}
        for limit in self.observations.goal.quality_limits if points else ():
            name = limit_name(limit)
            # Use the margins of all trials, after any share of training.
            margins = self.observations.margins.items()
            rooms = [(key, room) for key, rooms_of_trial in margins if (room := rooms_of_trial[name]) is not None]
            # The interval's lower half-width measures the uncertainty of a margin.
            halves = np.array([room.value - room.low for _, room in rooms])
            typical_half_width = float(np.median(halves)) if rooms else 0.0
            if len(rooms) < _FEWEST_KNOWN:
                continue
            if name not in self._processes:
                # Partly trained recipes may miss by far. Clip their margins, since the final ones are much closer.
                deepest = _CLIP_MULTIPLE * max(typical_half_width, _DISCREPANCY)
                full_rung = self.observations.full_rung
                values = np.array(
                    [room.value if rung < full_rung else max(room.value, -deepest) for (_, rung), room in rooms]
                )
                features = np.array([self._features(point, self.shares[rung]) for (point, rung), _ in rooms])
                deviations = np.maximum(halves / _HALF_WIDTHS_PER_DEVIATION, 1e-4)
                self._processes[name] = Surrogate.fit(
                    features, values, deviations, _DISCREPANCY, self._is_minor_feature
                )
            process = self._processes[name]
            bound = np.full(len(points), typical_half_width if self._front else picked.get(name, 0.0))
            chances = process.probability_at_least(queried, bound)
            if not self._front:
                # The improvement given that there is one, as a multiple of the usual half-width.
                improvement = process.expected_improvement(queried, bound) / np.maximum(chances, _LEAST)
                safety *= improvement / max(typical_half_width, _LEAST)
            products *= chances
        return np.maximum(products, _LEAST).tolist(), safety.tolist()

    def _features(self, point: Point, share: float) -> list[float]:
        """Return the features of a point: coordinates, predicted size, predicted time and share of training.

        Each is between about 0 and 1. Time holds information beyond the choices: a ninth of twelve epochs is shorter
        than three epochs.
        """
        # Sizes are relative to the recipe that the search starts from.
        size, start = (self.costs.predict(reference, "size_bytes") for reference in (point, self.observations.origin))
        ratio = size / start if size and start else 1.0
        lowest = math.log(self.shares[0]) if len(self.shares) > 1 else -1.0
        coordinates = [rank[index] for rank, index in zip(self._ranks, point, strict=True)]
        # Use the training time relative to that of the first recipe, on a logarithmic scale.
        longer = self.costs.total_seconds(point, share) / self.costs.total_seconds(self.observations.origin)
        return [*coordinates, math.log(ratio), math.log(longer) / 2, math.log(share) / lowest]
