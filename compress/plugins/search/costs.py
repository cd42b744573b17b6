"""Predictions about a recipe before it runs: size of its model, and time of the stages that remain."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import numpy as np

from compress.pipeline.planning import plan_context
from compress.pipeline.recipe_sources import Sources
from compress.plugins.search.outcome import TrialOutcome
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import Point, SearchSpace, shorten_training
from compress.stages.cost_model import Shape, predicted
from compress.stages.protocols import predict_cost
from compress.utils.errors import CompressError, InputError

_UNKNOWN_SECONDS = 5.0
"""Time of a stage that cannot be predicted, before one of its kind has run."""
_EVALUATION_SECONDS = 12.0
"""Time to load, evaluate and time a model, before any was evaluated."""
_FLOPS_PER_SECOND = 2e11
"""Speed assumed by predictions that decisions depend on.

A measured speed would differ between processes, and trials correct for it.
"""
_RECENT, _RIDGE = 5, 0.05
SIZE, PARAMETERS = "size_bytes", "parameters"
PREDICTED = (SIZE, PARAMETERS)
_COUNTED, _BY_ARITHMETIC = "counted", "by arithmetic"
_TOLERANCES: dict[str, tuple[float, tuple[float, ...]]] = {_COUNTED: (1e-4, ()), _BY_ARITHMETIC: (0.005, (0.05,))}
"""Smallest tolerance of each prediction method, and the errors that are assumed before a model was measured."""


@dataclass(frozen=True)
class PredictedStage:
    """Predicted cost of a stage. Recipes that do the same up to this stage share its ``key``."""

    key: str
    kind: str
    seconds: float
    disk: float | None
    shape: Shape | None


class CostEstimator:
    """Predictions of sizes and of the time of work, corrected by finished trials.

    Sizes are those of traced graphs (`SizeEstimator`), or else the number of weights times the predicted bits.
    Times of work are the stages' own predictions. Latencies are not predicted.

    Raises:
        InputError: With all problems of the recipe's sources.
    """

    def __init__(self, space: SearchSpace, size_estimator: SizeEstimator | None = None) -> None:
        """Read the sizes of model and data; ``size_estimator`` is more precise than the stages' arithmetic."""
        self.size_estimator = size_estimator
        recipe = space.base
        # Nothing is downloaded.
        sources = Sources(recipe, space.folder)
        start = sources.find_all()
        if sources.problems:
            raise InputError("\n".join(["The recipe cannot be searched:", *map(str, sources.problems)]))
        self.space, self._start = space, start
        self._context = replace(plan_context(recipe, sources, start), rate=lambda: _FLOPS_PER_SECOND)
        self._steps: dict[tuple[Point, float], list[PredictedStage]] = {}
        self._stages_done: set[str] = set()
        self._seconds_by_kind: dict[str, tuple[float, float]] = {}
        self._evaluation_times: list[float] = []
        self._ratios: dict[str, dict[Point, float]] = {}
        self._factors: dict[str, tuple[float, np.ndarray]] = {}
        self.errors: dict[str, list[float]] = {}
        """Relative errors of predictions by metric, for every model after the first."""
        self._errors_by_method: dict[tuple[str, str], list[float]] = {}
        """The same errors by metric and prediction method."""

    def predicted_stages(self, point: Point, share: float = 1.0) -> list[PredictedStage]:
        """Return the predicted cost of every stage. Raises `InputError` for values that do not fit."""
        if (point, share) not in self._steps:
            self._steps[point, share] = self._predict_stages(point, share)
        return self._steps[point, share]

    def marginal_seconds(self, point: Point, share: float = 1.0) -> float:
        """Return the predicted time of the stages that no trial has run, and of the evaluation.

        Decisions depend on this prediction only, so that a resumed search decides as an uninterrupted one.
        """
        return _EVALUATION_SECONDS + sum(self.remaining(point, share).values())

    def remaining(self, point: Point, share: float = 1.0) -> dict[str, float]:
        """Return the predicted time of each stage that no trial has run, by its key."""
        steps = self.predicted_stages(point, share)
        return {step.key: step.seconds for step in steps if step.key not in self._stages_done}

    def total_seconds(self, point: Point, share: float = 1.0) -> float:
        """Return the predicted time of all stages, cached or not."""
        return sum(step.seconds for step in self.predicted_stages(point, share))

    def corrected_total_seconds(self, point: Point) -> float:
        """Return the time of all stages, corrected by finished trials."""
        return sum(self._seconds(step) for step in self.predicted_stages(point))

    def corrected_remaining_seconds(self, point: Point, share: float = 1.0) -> float:
        """Return the time of the remaining stages and the evaluation, corrected by finished trials."""
        steps = (step for step in self.predicted_stages(point, share) if step.key not in self._stages_done)
        return sum(map(self._seconds, steps)) + self.evaluation_seconds

    @property
    def evaluation_seconds(self) -> float:
        """Mean time that a trial takes beside its stages."""
        times = self._evaluation_times or [_EVALUATION_SECONDS]
        return sum(times) / len(times)

    def predict(self, point: Point, metric: str) -> float | None:
        """Return the predicted value of a metric of the final model; None where it cannot be predicted."""
        # The size of a traced graph is exact. Arithmetic is the fallback.
        if metric == SIZE and (counted := self._counted(point)) is not None:
            return counted
        return self.predict_analytically(point, metric)

    def predict_analytically(self, point: Point, metric: str) -> float | None:
        """Return the prediction that needs no traced graph; None where there is none."""
        raw, factors = self._raw(point, metric), self._factors.get(metric)
        if raw is None or factors is None:
            return None
        centre, weights = factors
        return raw * float(np.exp(centre + self._one_hot(point) @ weights))

    def family(self, point: Point) -> tuple[object, ...]:
        """Return the kinds of the stages and the number of layers.

        Recipes that share them are comparable when partly trained.
        """
        steps = self.predicted_stages(point)
        last = steps[-1].shape
        return (*(step.kind for step in steps), 0 if last is None else last.layers)

    def tolerance(self, point: Point, metric: str) -> float:
        """Return the relative error that a prediction may have, by the errors of earlier predictions of this method."""
        method = self._prediction_method(point, metric)
        least, unknown = _TOLERANCES[method]
        errors = self._errors_by_method.get((metric, method), unknown)[-_RECENT:]
        return max([least, *(1.5 * abs(error) for error in errors)])

    def _prediction_method(self, point: Point, metric: str) -> str:
        """Return the method by which a metric is predicted."""
        return _COUNTED if metric == SIZE and self._counted(point) is not None else _BY_ARITHMETIC

    def imprecision_reasons(self) -> dict[str, str]:
        """Return for each metric why some recipes are predicted less precisely."""
        reason = "" if self.size_estimator is None else self.size_estimator.unavailable_reason
        return {SIZE: reason} if reason else {}

    def update(self, point: Point, share: float, outcome: TrialOutcome) -> None:
        """Record the times and sizes of a trial."""
        if self.size_estimator is not None:
            self.size_estimator.start(outcome)
        steps = self.predicted_stages(point, share)
        # Every stage of the trial is cached now, whether this trial ran it or an earlier one.
        for step, cost in zip(steps, outcome.stages, strict=False):
            self._stages_done.add(step.key)
            if not cost.cached:
                predicted_seconds, measured_seconds = self._seconds_by_kind.get(step.kind, (0.0, 0.0))
                self._seconds_by_kind[step.kind] = predicted_seconds + step.seconds, measured_seconds + cost.seconds
        ran = sum(cost.seconds for cost in outcome.stages if not cost.cached)
        # The first trial evaluates the baseline too, so half of its time counts.
        self._evaluation_times.append(max(outcome.seconds - ran, 0.0) / (1 if self._evaluation_times else 2))
        if share == 1:
            self._update_metrics(point, outcome)

    def _update_metrics(self, point: Point, outcome: TrialOutcome) -> None:
        """Compare the metrics of a recipe that was trained in full with their predictions, and correct these."""
        for metric in PREDICTED:
            actual, raw = outcome.final.get(metric), self._raw(point, metric)
            # Compare before the prediction is corrected by this very measurement.
            if actual:
                self._compare(metric, point, actual)
            if actual and raw:
                self._ratios.setdefault(metric, {})[point] = actual / raw
                # Fit the ratio of measured to predicted values as a product of one factor for each choice, by ridge
                # regression of the logarithm. A choice that no trial has tested has the factor 1.
                ratios = self._ratios[metric]
                values = np.log(np.array(list(ratios.values())))
                rows = np.array([self._one_hot(tested) for tested in ratios])
                # The dual form of ridge regression solves a system as large as the number of trials, not of choices.
                inner = rows @ rows.T + _RIDGE * np.eye(len(rows))
                self._factors[metric] = values.mean(), rows.T @ np.linalg.solve(inner, values - values.mean())

    def _compare(self, metric: str, point: Point, actual: float) -> None:
        """Record the error of the prediction for a model that was unseen until now."""
        predicted = self.predict(point, metric)
        if predicted is not None:
            error, method = predicted / actual - 1, self._prediction_method(point, metric)
            self.errors.setdefault(metric, []).append(error)
            self._errors_by_method.setdefault((metric, method), []).append(error)

    def _counted(self, point: Point) -> int | None:
        """Return the bytes of the traced graph; None where there is none."""
        return None if self.size_estimator is None else self.size_estimator.size_bytes(point)

    def _one_hot(self, point: Point) -> np.ndarray:
        """Return the one-hot encoding of a point."""
        sizes = [len(parameter.values) for parameter in self.space.parameters]
        encoding = np.zeros(sum(sizes))
        encoding[np.cumsum([0, *sizes[:-1]]) + np.array(point)] = 1.0
        return encoding

    def _seconds(self, step: PredictedStage) -> float:
        predicted_seconds, measured_seconds = self._seconds_by_kind.get(step.kind, (0.0, 0.0))
        return step.seconds * measured_seconds / predicted_seconds if predicted_seconds else step.seconds

    def _raw(self, point: Point, metric: str) -> float | None:
        last = self.predicted_stages(point)[-1]
        # Exact counts of weights are better than the stages' estimates of them.
        counted = None if self.size_estimator is None else self.size_estimator.weight_counts(point)
        if counted is None or last.shape is None:
            predictions = {SIZE: last.disk, PARAMETERS: None if last.shape is None else last.shape.parameters}
            return predictions.get(metric)
        if metric != SIZE:
            return counted.parameters if metric == PARAMETERS else None
        shape = counted.in_bits(last.shape.matrix_bits, last.shape.table_bits)
        return predicted(shape, shape).disk_bytes.value

    def _predict_stages(self, point: Point, share: float) -> list[PredictedStage]:
        recipe = self.space.unchecked_recipe(point)
        stages = shorten_training(recipe, share) if share < 1 else recipe.stages
        # Stages record their output shapes in the context, so each recipe has its own.
        context = replace(self._context, shapes={"start": self._start})
        shape, predicted_stages, digest = self._start, list[PredictedStage](), hashlib.sha256()
        for stage, label in zip(stages, recipe.labels(), strict=True):
            # The key of a stage covers all stages up to it.
            digest.update(json.dumps(stage.model_dump(mode="json"), sort_keys=True).encode())
            try:
                prediction = predict_cost(stage, shape, context)
            except InputError:
                raise
            except CompressError as error:
                raise InputError(str(error)) from error
            shape = context.shapes[label] = prediction.shape
            # A later stage starts from the shape that this one predicts.
            seconds = _UNKNOWN_SECONDS if prediction.seconds.value is None else prediction.seconds.value
            disk = prediction.disk_bytes.value
            predicted_stages.append(PredictedStage(digest.hexdigest(), stage.kind, seconds, disk, shape))
        return predicted_stages
