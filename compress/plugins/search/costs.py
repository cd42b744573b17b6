"""What is known of a recipe before it runs: how large and how fast its model will be, and what is left to do."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from compress.pipeline.planning import plan_context
from compress.pipeline.recipe_sources import Sources
from compress.plugins.search.latency_estimator import LatencyEstimator
from compress.plugins.search.outcome import TrialOutcome
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import Point, SearchSpace, shortened
from compress.stages.base import Stage
from compress.stages.cost_model import Shape, predicted
from compress.stages.protocols import predict_cost
from compress.utils.errors import CompressError, InputError

_UNKNOWN_SECONDS = 5.0
"""Of a stage that nobody can predict, before one like it has run."""
_JUDGED_SECONDS = 12.0
"""Of opening a model, asking it for the rows that choose and timing it, before any was judged."""
_FLOPS_PER_SECOND = 2e11
"""Of predictions that decide: a machine's own rate is measured anew by each process, and trials correct for it."""
_RECENT, _RIDGE = 5, 0.05
SIZE, PARAMETERS, LATENCY = "size_bytes", "parameters", "latency_ms"
PREDICTED = (SIZE, PARAMETERS)
_COUNTED, _BY_ARITHMETIC, _BY_KERNELS = "counted", "by arithmetic", "by kernels"
_OFF: dict[str, tuple[float, tuple[float, ...]]] = {
    _COUNTED: (1e-4, ()), _BY_ARITHMETIC: (0.005, (0.05,)), _BY_KERNELS: (0.02, (0.15,)),
}  # fmt: skip
"""How a figure is foretold -> how far off it is taken to be at the least, and before any model was made."""


@dataclass(frozen=True)
class PredictedStage:
    """One stage as it is foreseen. ``key`` is what recipes share that do the same up to here."""

    key: str
    kind: str
    seconds: float
    disk: float | None
    shape: Shape | None


class CostEstimator:
    """Sizes, times and seconds of work, corrected by what trials have shown.

    Sizes are those of graphs that are foreseen (`SizeEstimator`), or else of the weights that it counts, or that stages
    predict, in the bits that stages predict; times are sums over kernels (`LatencyEstimator`); seconds of work are the stages'
    own predictions.
    Raises `InputError` with all problems of the recipe's sources.
    """

    foresight: SizeEstimator | None = None
    latencies: LatencyEstimator | None = None
    """Who knows more of sizes than the stages' arithmetic, and who knows times; given by `foresee`."""

    def __init__(self, space: SearchSpace) -> None:
        recipe = space.base
        sources = Sources(recipe, space.folder)
        start = sources.find_all()
        if sources.problems:
            listed = "\n".join(map(str, sources.problems))
            raise InputError(f"The recipe cannot be searched:\n{listed}")
        self.space, self.task = space, recipe.task
        self._start = start
        self._context = replace(plan_context(recipe, sources, start), rate=lambda: _FLOPS_PER_SECOND)
        self._steps: dict[tuple[Point, float], list[PredictedStage]] = {}
        self._done: set[str] = set()
        self._taken: dict[str, tuple[float, float]] = {}
        self._beside: list[float] = []
        self._ratios: dict[str, dict[Point, float]] = {}
        self._factors: dict[str, tuple[float, np.ndarray]] = {}
        self.errors: dict[str, list[float]] = {}
        """Metric -> how far predictions were off, relative, of every model that came after the first."""
        self._off: dict[tuple[str, str], list[float]] = {}
        """The same by how they were foretold, too."""

    def predicted_stages(self, point: Point, share: float = 1.0) -> list[PredictedStage]:
        """Every stage at a point. Raises `InputError` for values that don't fit."""
        if (point, share) not in self._steps:
            self._steps[point, share] = self._foreseen(point, share)
        return self._steps[point, share]

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
        """What is left to do for it by prediction alone: stages that no trial has done, and judging the result.

        What is tried next goes by this, so that a search that was killed decides as one that was not.
        """
        return _JUDGED_SECONDS + sum(self.remaining(point, share).values())

    def remaining(self, point: Point, share: float = 1.0) -> dict[str, float]:
        """Seconds of the stages that no trial has done, by what recipes share that do the same up to there."""
        return {step.key: step.seconds for step in self.predicted_stages(point, share) if step.key not in self._done}

    def total_seconds(self, point: Point, share: float = 1.0) -> float:
        """Of all its stages, whoever has done them."""
        return sum(step.seconds for step in self.predicted_stages(point, share))

    def corrected_total_seconds(self, point: Point) -> float:
        """Of all its stages, whoever has done them, as trials so far have corrected it."""
        return sum(self._seconds(step) for step in self.predicted_stages(point))

    def corrected_remaining_seconds(self, point: Point, share: float = 1.0) -> float:
        """The same as trials so far have corrected it: whether there is time for it."""
        left = sum(self._seconds(step) for step in self.predicted_stages(point, share) if step.key not in self._done)
        return left + self.evaluation_seconds

    @property
    def evaluation_seconds(self) -> float:
        """What a trial takes besides its stages, to be judged and timed."""
        return sum(self._beside) / len(self._beside) if self._beside else _JUDGED_SECONDS

    def use_estimators(self, foresight: SizeEstimator, latencies: LatencyEstimator) -> None:
        """Let these tell sizes and times, once the first trial has made the baseline."""
        self.foresight, self.latencies = foresight, latencies

    def predict(self, point: Point, metric: str) -> float | None:
        """A figure of the final model; None where nothing foretells it."""
        if metric == LATENCY:
            return None if self.latencies is None else self.latencies.predict(point)
        if metric == SIZE and (counted := self._counted(point)) is not None:
            return counted
        return self.predict_analytically(point, metric)

    def predict_analytically(self, point: Point, metric: str) -> float | None:
        """The same by arithmetic alone, for which no graph is traced; None where that tells nothing."""
        raw, factors = self._raw(point, metric), self._factors.get(metric)
        if raw is None or factors is None:
            return None
        centre, weights = factors
        return raw * float(np.exp(centre + self._choices(point) @ weights))

    def family(self, point: Point) -> tuple[object, ...]:
        """What recipes share that may be compared before they are trained in full: stages, and layers left."""
        steps = self.predicted_stages(point)
        last = steps[-1].shape
        return (*(step.kind for step in steps), 0 if last is None else last.layers)

    def tolerance(self, point: Point, metric: str) -> float:
        """How far a prediction may be off before nothing is decided by it.

        It is off by what others were that were foretold as it is: sizes counted or by arithmetic, times by kernels.
        """
        least, unknown = _OFF[how := self._how(point, metric)]
        return max([least, *(1.5 * abs(error) for error in self._off.get((metric, how), unknown)[-_RECENT:])])

    def _how(self, point: Point, metric: str) -> str:
        """How a figure is foretold."""
        if metric == LATENCY:
            return _BY_KERNELS
        return _COUNTED if metric == SIZE and self._counted(point) is not None else _BY_ARITHMETIC

    def imprecision_reasons(self) -> dict[str, str]:
        """Metric -> why recipes, or some of them, are told more roughly than they might be."""
        known = {SIZE: self.foresight, LATENCY: self.latencies}
        return {
            metric: told.unavailable_reason
            for metric, told in known.items()
            if told is not None and told.unavailable_reason
        }

    def update(self, point: Point, share: float, outcome: TrialOutcome) -> None:
        """Take note of what a trial took and weighed."""
        if outcome.error is not None:
            return
        if self.foresight is not None:
            self.foresight.start(outcome)
        steps = self.predicted_stages(point, share)
        for step, cost in zip(steps, outcome.stages, strict=False):
            self._done.add(step.key)
            if not cost.cached:
                told, took = self._taken.get(step.kind, (0.0, 0.0))
                self._taken[step.kind] = told + step.seconds, took + cost.seconds
        ran = sum(cost.seconds for cost in outcome.stages if not cost.cached)
        # The first trial judges the baseline too.
        self._beside.append(max(outcome.seconds - ran, 0.0) / (1 if self._beside else 2))
        if share < 1:
            return
        for metric in PREDICTED:
            actual, raw = outcome.final.get(metric), self._raw(point, metric)
            if actual:
                self._compare(metric, point, actual)
            if actual and raw:
                self._ratios.setdefault(metric, {})[point] = actual / raw
                self._fit(metric)
        timed = outcome.final.get(LATENCY)
        if timed and self.latencies is not None:
            if self.latencies.is_calibrated:
                self._compare(LATENCY, point, timed)
            self.latencies.update(point, timed)

    def _compare(self, metric: str, point: Point, actual: float) -> None:
        """Keep by how much a prediction was off, of a model that was still unseen."""
        told = self.predict(point, metric)
        if told is not None:
            self.errors.setdefault(metric, []).append(told / actual - 1)
            self._off.setdefault((metric, self._how(point, metric)), []).append(told / actual - 1)

    def _counted(self, point: Point) -> int | None:
        """Bytes that a graph tells; None where arithmetic has to."""
        return None if self.foresight is None else self.foresight.size_bytes(point)

    def _fit(self, metric: str) -> None:
        """What was made over what the stages foretold, as a product of a factor for each choice (ridge regression).

        A choice that nobody tried has the factor 1.
        """
        ratios = self._ratios[metric]
        values = np.log(np.array(list(ratios.values())))
        rows = np.array([self._choices(known) for known in ratios])
        inner = rows @ rows.T + _RIDGE * np.eye(len(rows))
        self._factors[metric] = values.mean(), rows.T @ np.linalg.solve(inner, values - values.mean())

    def _choices(self, point: Point) -> np.ndarray:
        """Which value each choice has, as ones among zeros."""
        sizes = [len(parameter.values) for parameter in self.space.parameters]
        found = np.zeros(sum(sizes))
        found[np.cumsum([0, *sizes[:-1]]) + np.array(point)] = 1.0
        return found

    def _seconds(self, step: PredictedStage) -> float:
        told, took = self._taken.get(step.kind, (0.0, 0.0))
        return step.seconds * took / told if told else step.seconds

    def _raw(self, point: Point, metric: str) -> float | None:
        last = self.predicted_stages(point)[-1]
        counted = None if self.foresight is None or last.shape is None else self.foresight.weight_counts(point)
        if counted is None or last.shape is None:
            told = {SIZE: last.disk, PARAMETERS: None if last.shape is None else last.shape.parameters}
            return told.get(metric)
        if metric != SIZE:
            return counted.parameters if metric == PARAMETERS else None
        shape = counted.in_bits(last.shape.matrix_bits, last.shape.table_bits)
        return predicted(shape, shape).disk_bytes.value

    def _foreseen(self, point: Point, share: float) -> list[PredictedStage]:
        stages: Sequence[Stage[Any, Any]] = self.space.stages(point)
        if share < 1:
            stages = shortened(self.space.base.model_copy(update={"stages": tuple(stages)}), share)
        context = replace(self._context, shapes={"start": self._start})
        labels = self.space.base.model_copy(update={"stages": tuple(stages)}).labels()
        shape, found, sofar = self._start, list[PredictedStage](), hashlib.sha256()
        for stage, label in zip(stages, labels, strict=True):
            sofar.update(json.dumps(stage.model_dump(mode="json"), sort_keys=True).encode())
            try:
                told = predict_cost(stage, shape, context)
            except InputError:
                raise
            except CompressError as error:
                raise InputError(str(error)) from error
            shape = context.shapes[label] = told.shape
            seconds = told.seconds.value
            found.append(
                PredictedStage(
                    key=sofar.hexdigest(),
                    kind=stage.kind,
                    seconds=_UNKNOWN_SECONDS if seconds is None else seconds,
                    disk=told.disk_bytes.value,
                    shape=shape,
                )
            )
        return found
