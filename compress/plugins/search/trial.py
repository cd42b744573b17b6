"""Trial of a recipe: it is run and evaluated on the selection rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from compress.pipeline.formats import measurable, written
from compress.pipeline.generation_evals import judgements
from compress.pipeline.runner import StageRunner
from compress.pipeline.target_session import TargetSession
from compress.plugins.ray.jobs import InProcessWorkers, Job, JobContext, JobResult, Workers
from compress.plugins.search.early_stopping import PROXY_METRICS, measure_divergence
from compress.plugins.search.outcome import Goal, StageCost, TrialOutcome, target_profile
from compress.recipe.recipe import Recipe
from compress.results.report import BASELINE, FINAL, Measurement
from compress.utils.errors import CompressError, first_line
from compress.utils.progress import Progress, SilentProgress

_LAUNCHES, _SECONDS, _PRECISION = 3, 0.7, 0.02


Speculation = Callable[[Mapping[int, TrialOutcome]], Sequence[Job]]
"""Function that returns the trials that may be tried next, given the outcomes of the round by their index."""


@dataclass(frozen=True)
class EvaluateModels:
    """Evaluation of a recipe's final model and baseline on a split: sizes, quality and divergence."""

    split: str

    def __call__(self, runner: StageRunner) -> tuple[str, list[Measurement]]:
        """Return the digest of the final model, and the measurements of both models."""
        session = _session_of(runner, self.split, (BASELINE, FINAL))
        # Latency is measured separately, since not every trial needs it.
        rows = [*session.sizes(), *session.accuracies([]), *judgements(session, []), *measure_divergence(session)]
        return session.digests[FINAL], rows


@dataclass(frozen=True)
class EvaluateBaseline:
    """Evaluation of the baseline alone, whose result stays in the cache for `EvaluateModels`."""

    split: str

    def __call__(self, runner: StageRunner) -> None:
        """Evaluate the baseline."""
        profile = target_profile(runner.recipe)
        folder = written(runner, runner.recipe.baseline, profile.target.format, profile.options)
        TargetSession(runner, profile, {BASELINE: folder}, self.split).accuracies([])


@dataclass(frozen=True)
class MeasureLatency:
    """Latency of the final model on a split; of the baseline too where times are compared."""

    split: str
    compared: bool

    def __call__(self, runner: StageRunner) -> list[Measurement]:
        """Return the measurements."""
        labels = (BASELINE, FINAL) if self.compared else (FINAL,)
        return _session_of(runner, self.split, labels).timings(remeasure=False)[0]


@dataclass
class TrialRunner:
    """Trials of recipes that share their data, run by workers."""

    goal: Goal
    context: JobContext
    workers: Workers

    @classmethod
    def in_process(cls, goal: Goal, context: JobContext) -> TrialRunner:
        """Return a runner that runs trials one after another in this process."""
        return cls(goal, context, InProcessWorkers(context))

    def run_recipe(self, recipe: Recipe) -> StageRunner:
        """Run a recipe, measuring only its baseline and its final model, and return its stage runner."""
        runner = self.context.runner(_without_stages(recipe))
        runner.run_all()
        return runner

    def run(self, recipe: Recipe, timed: bool) -> TrialOutcome:
        """Run and evaluate one recipe."""
        return next(self.run_all([self.job(recipe, timed)]))

    def run_all(self, trials: Iterable[Job], guess: Speculation | None = None) -> Iterator[TrialOutcome]:
        """Run and evaluate trials; outcomes come in the order of the trials.

        A recipe that fails has an outcome with an error. A full disk ends the search.

        Args:
            trials: Trials to run.
            guess: Function that returns the next trials that idle workers may start.

        Returns:
            Outcome of each trial.
        """

        def next_jobs(arrived: Mapping[int, JobResult]) -> Sequence[Job]:
            assert guess is not None
            return guess({index: self._outcome(result) for index, result in arrived.items()})

        return map(self._outcome, self.workers.run_all(trials, guess and next_jobs))

    def evaluate_all(self, recipes: Iterable[Recipe], split: str) -> Iterator[list[Measurement] | CompressError]:
        """Return the measurements of recipes on a split, or the error of each that fails."""
        jobs = (
            Job(_without_stages(recipe), evaluate=EvaluateModels(split), evaluate_baseline=EvaluateBaseline(split))
            for recipe in recipes
        )
        for result in self.workers.run_all(jobs):
            yield result.evaluation[1] if result.error is None else result.error

    def job(self, recipe: Recipe, timed: bool, seconds: float = 0.0) -> Job:
        """Return the trial of a recipe, which is predicted to take so many seconds.

        Latency is measured too if the trial is ``timed`` and the goal needs it.
        """
        assert recipe.search is not None
        split, benchmark = recipe.search.select.split, recipe.benchmark
        # These settings are precise enough to choose by. The final evaluation uses the recipe's own.
        launches, call_seconds = min(benchmark.launches, _LAUNCHES), min(benchmark.seconds, _SECONDS)
        brief = benchmark.model_copy(update={"batched": False, "launches": launches, "seconds": call_seconds})
        recipe = _without_stages(recipe.model_copy(update={"benchmark": brief}))
        measure = MeasureLatency(split, self.goal.compares_times) if timed and self.goal.needs_timing else None
        return Job(recipe, EvaluateModels(split), measure, seconds, evaluate_baseline=EvaluateBaseline(split))

    def _outcome(self, result: JobResult) -> TrialOutcome:
        if result.error is not None:
            return TrialOutcome(error=first_line(result.error), seconds=result.seconds)
        # The digest identifies equal models of different recipes.
        model, rows = result.evaluation
        stages = tuple(
            StageCost(label=record.name, key=record.key, seconds=record.seconds, cached=record.cached)
            for record in result.stages
        )
        row_metrics = (*self.goal.quality_metrics, *PROXY_METRICS)
        outcome = TrialOutcome.from_measurements([*rows, *(result.timings or ())], row_metrics)
        return outcome.model_copy(update={"model": model, "stages": stages, "seconds": result.seconds})


def _session_of(runner: StageRunner, split: str, labels: Sequence[str]) -> TargetSession:
    """Return a measuring session for models of a recipe that was run, in the format of its target."""
    profile = target_profile(runner.recipe)
    artifacts = measurable(runner, profile.target.format, profile.options)
    return TargetSession(runner, profile, {label: artifacts[label] for label in labels}, split, precision=_PRECISION)


def _without_stages(recipe: Recipe) -> Recipe:
    """Return the recipe with measurements of its baseline and its final model only."""
    return recipe.model_copy(update={"benchmark": recipe.benchmark.model_copy(update={"every_stage": False})})


class BarsOnly(SilentProgress):
    """Progress that shows bars only, since notes of the stages would hide those of the search."""

    def __init__(self, inner: Progress) -> None:
        self.track = inner.track  # type: ignore[method-assign]
