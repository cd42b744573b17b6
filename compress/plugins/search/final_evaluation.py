"""Final evaluation of a search on the test rows, which no decision depended on, with refit and further seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from compress.data.dataset import TEST
from compress.pipeline.formats import measurable
from compress.pipeline.generation_evals import judgements
from compress.pipeline.target_session import TargetSession
from compress.plugins.ray.jobs import Job
from compress.plugins.search.costs import SIZE, CostEstimator
from compress.plugins.search.engine import Engine
from compress.plugins.search.observations import Observations
from compress.plugins.search.outcome import TrialOutcome, target_profile
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import Point, SearchSpace
from compress.plugins.search.trial import TrialRunner
from compress.recipe.recipe import Recipe, Search
from compress.report.limits import check_limits
from compress.results.report import BASELINE, FINAL, LimitResult, Measurement
from compress.utils.errors import CompressError, InputError, first_line
from compress.utils.pydantic_models import Frozen

_LEAST_SHARE = 1 / 20
"""Least number of selection rows, as a share of the training rows, for which a refit is worth its time."""


@dataclass
class Refit:
    """Decisions about the refit of a search."""

    space: SearchSpace
    trials: TrialRunner
    size_estimator: SizeEstimator

    @cached_property
    def enabled(self) -> bool:
        """Return whether the winner is refitted: by the recipe, or else by the number of selection rows."""
        # An explicit setting wins, and `check_refit` has refused an impossible one.
        setting = self.space.search.refit
        if setting is not None:
            return setting
        return _why_not(self.space) is None and self.more_rows >= _LEAST_SHARE

    @cached_property
    def more_rows(self) -> float:
        """Number of selection rows as a share of the training rows."""
        data = self.trials.context.runner(self.space.base).inputs.data
        return len(data.split(self.space.search.select.split)) / len(data.split("train"))

    def recipe(self, point: Point, seed: int | None = None) -> Recipe:
        """Return the recipe at a point, with the selection rows in its training data if the refit is enabled."""
        return self.space.recipe(point, seed=seed, refit=self.enabled)

    def fits_limits(self, point: Point, observations: Observations) -> bool:
        """Return whether the refitted model is predicted to meet every limit on size."""
        if not self.enabled or not self.size_estimator.is_ready or observations.origin not in observations.finished:
            return True
        baseline = observations.finished[observations.origin].baseline
        for limit in observations.goal.limits:
            size_bytes = self.size_estimator.size_bytes(point) if limit.metric == SIZE else None
            if limit.at_most is None or size_bytes is None:
                continue
            bound = limit.at_most * (1.0 if limit.of is None else baseline[SIZE])
            # The vocabulary grows slower than the rows (Heaps 1978, section 7.5) and is only a part of the size. So a
            # size that fits after growing like the rows needs no further estimate.
            if size_bytes * (1 + self.more_rows) > bound:
                refit_bytes = self._estimator_of_all_rows.size_bytes(point)
                if refit_bytes is not None and refit_bytes > bound:
                    return False
        return True

    @cached_property
    def _estimator_of_all_rows(self) -> SizeEstimator:
        return self.size_estimator.with_data_of(self.trials.context.runner(self.recipe(self.space.origin)))


def check_refit(space: SearchSpace) -> None:
    """Raise `InputError` where the recipe asks for a refit that its rows do not allow."""
    if space.search.refit and (why := _why_not(space)) is not None:
        raise InputError(
            f"The best recipe cannot be retrained on the selection rows at the end: {why}.",
            where="search.refit",
            expected="rows held out of train, the last of what is held out, and a stage that trains",
            hint="remove `refit`",
        )


def _why_not(space: SearchSpace) -> str | None:
    hold_out, split = space.base.data.hold_out or (), space.search.select.split
    if split not in [split_config.split for split_config in hold_out]:
        return "they are a split of their own"
    if hold_out[-1].split != split:
        return f"{hold_out[-1].split} is drawn from what they leave, and would be other rows without them"
    if hold_out[-1].source != "train":
        return f"they are rows of {hold_out[-1].source}, which nothing is trained on"
    return None if space.trains(space.origin) else "nothing is trained"


FRONT = 3
WINNER, CHOSEN, ORIGIN = "winner", "as chosen", "trial 0"
_EARLIER = "the trials' baseline"
_TIMING_SECONDS, _TIMING_SHARE = 60.0, 0.2
"""Usual seconds of latency measurement at the end, and its largest share of a short search."""
_SESSION_MODELS = 2.0
"""Number of models whose evaluation time is reserved for the final evaluation."""


class FinalCandidate(NamedTuple):
    """Model of the final evaluation. With ``refit`` it was trained on the selection rows too."""

    point: Point
    refit: bool = False


class EvaluatedModel(Frozen):
    """Model of the final evaluation with its metrics.

    The ``intervals`` of all models hold together with 95% confidence.
    """

    name: str
    point: tuple[int, ...]
    words: str
    final: dict[str, float]
    baseline: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    limits: tuple[LimitResult, ...]
    folder: str

    @property
    def meets_limits(self) -> bool:
        """Return whether no limit was missed."""
        return self.state != "missed"

    @property
    def state(self) -> Literal["missed", "unknown", "passed"]:
        """Return the worst result of a limit."""
        if any(limit.missed for limit in self.limits):
            return "missed"
        return "unknown" if any(limit.unknown for limit in self.limits) else "passed"

    @property
    def verdict(self) -> str:
        """Return the number of limits with the worst result, such as `1 missed`."""
        missed, unknown = sum(limit.missed for limit in self.limits), sum(limit.unknown for limit in self.limits)
        return f"{missed} missed" if missed else f"{unknown} can't tell" if unknown else "all kept"


class SeedResult(Frozen):
    """Metrics of the winner trained with another seed, baseline included."""

    seed: int
    final: dict[str, float]
    baseline: dict[str, float]
    limits: tuple[LimitResult, ...]
    error: str | None = None


class FinalResult(Frozen):
    """Results on the test rows."""

    confidence: float
    judged: tuple[EvaluatedModel, ...]
    refit: bool = False
    """Whether the winner and its further seeds were trained on the selection rows too."""
    seeds: tuple[SeedResult, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def winner(self) -> EvaluatedModel:
        """Return the winner, which is the first model."""
        return self.judged[0]


def expected_timing_seconds(search: Search) -> float:
    """Return about how long latency measurement takes at the end."""
    return min(_TIMING_SECONDS, _TIMING_SHARE * search.seconds)


def timing_budget(search: Search) -> float | None:
    """Return the time limit of latency measurement; None where the search is long enough to need none."""
    seconds = expected_timing_seconds(search)
    return seconds if seconds < _TIMING_SECONDS else None


@dataclass
class FinalEvaluation:
    """Planning and execution of the final evaluation on the test rows."""

    space: SearchSpace
    costs: CostEstimator
    engine: Engine
    trials: TrialRunner
    refit: Refit

    @property
    def seeds(self) -> int:
        """Number of further seeds; none where nothing is trained."""
        return self.space.search.seeds if len(self.engine.shares) > 1 else 0

    def prefetch_jobs(self) -> list[Job]:
        """Return jobs that are needed whatever the winner is: the baselines of further seeds and of the refit."""
        base = self.space.base
        if base.baseline not in self.space.labels:
            return []
        # These trainings do not depend on the search, so idle workers may run them from the start.
        seeds = [base.seed] * self.refit.enabled + [*self._further_seeds(self.seeds)]
        return [Job(self.refit.recipe(self.space.origin, seed), last_stage=base.baseline) for seed in seeds]

    def _further_seeds(self, count: int) -> range:
        """Return the seeds that follow the recipe's own."""
        return range(self.space.base.seed + 1, self.space.base.seed + 1 + count)

    def reserved_seconds(self) -> float:
        """Return the time to reserve for tests, latency measurement, refit and further seeds.

        Without a feasible recipe, no time is reserved for seeds, so that trials may find one.
        """
        session, observations = self._session_seconds(), self.engine.observations
        ranked = observations.ranked()
        trainings = self.refit.enabled + (self.seeds if ranked else 0)
        if not trainings:
            return session
        # The winner is unknown yet. The present pick is the best guess of its training time.
        likely = next(iter(ranked or observations.by_shortfall()), self.space.origin)
        return session + min(trainings * self._retrain_seconds(likely), 0.5 * self.space.search.seconds)

    def _session_seconds(self) -> float:
        return expected_timing_seconds(self.space.search) + _SESSION_MODELS * self.costs.evaluation_seconds

    def _retrain_seconds(self, point: Point) -> float:
        """Return about how long it takes to train a recipe once more."""
        return (1 + self.refit.more_rows if self.refit.enabled else 1) * self.costs.corrected_total_seconds(point)

    def affordable_seeds(self, best: Point, refit: bool, left: float) -> int:
        """Return for how many further seeds ``left`` seconds suffice, beside the refit and the final evaluation."""
        seconds_per_training = max(self._retrain_seconds(best), 1e-9)
        # Workers train in parallel, so their number multiplies the affordable trainings.
        trainings = int((left - self._session_seconds()) * self.trials.workers.width / seconds_per_training)
        return min(self.seeds, max(0, trainings - refit))

    def run(self, note: Callable[[str], None], announce: Callable[[str], None], left: float) -> FinalResult | None:
        """Evaluate the winner on the test rows; None where no recipe's measured values meet every limit.

        Args:
            note: Function that prints a line.
            announce: Function that shows the present work.
            left: Seconds left, which limit the number of further seeds.
        """
        observations = self.engine.observations
        pick = next(iter(observations.ranked()), None)
        if pick is None:
            return None
        # The winner is the pick, or the next recipe that meets the limits on size after a refit.
        trained = (point for point in observations.ranked() if self.refit.enabled and self.space.trains(point))
        refitted = next((point for point in trained if self.refit.fits_limits(point, observations)), None)
        best, refit, seeds = refitted or pick, refitted is not None, list[SeedResult]()
        purposes = ["on the selection rows too"] * refit
        count = self.affordable_seeds(best, refit, left)
        if count < self.seeds:
            note(f"there is time for {count or 'none'} of the best recipe's {self.seeds} further training seeds")
        if count:
            purposes.append(f"with {count} more seed{'s'[: count > 1]}")
        if purposes:
            announce(f"retraining the best recipe, {' and '.join(purposes)}")
            failed, seeds = self._retrain(best, count, refit)
            if failed is not None:
                note(f"retraining failed, so the best recipe's first model is used: {first_line(failed)}")
                # The seeds were trained on the selection rows too, so they do not describe this winner.
                best, refit, seeds = pick, False, []
        # No speculative work may disturb the measurement of latency.
        self.trials.workers.cancel()
        announce(f"final evaluation on the test rows: {self.space.describe(best)}")
        final = self._evaluate(best, refit)
        return final.model_copy(update={"seeds": tuple(seeds)})

    def _candidates(self, best: Point, refit: bool) -> dict[str, FinalCandidate]:
        """Return the models of the final evaluation by name.

        These are the winner, the recipe that the search started from, and up to three more of the front. A refitted
        winner is compared with its state before the refit too.
        """
        models, origin = {WINNER: FinalCandidate(best, refit)}, self.space.origin
        if refit:
            models[CHOSEN] = FinalCandidate(best)
        if best != origin:
            models[ORIGIN] = FinalCandidate(origin)
        others = [point for point in self.engine.observations.pareto_front() if point not in (best, origin)]
        # Show both ends and the middle of a long front.
        spread = others if len(others) <= FRONT else [others[0], others[len(others) // 2], others[-1]]
        return models | {f"front {index}": FinalCandidate(point) for index, point in enumerate(spread, 1)}

    def _evaluate(self, best: Point, refit: bool) -> FinalResult:
        """Evaluate and time the winner and the other models side by side on the test rows. There is no second pick.

        Limits relative to the baseline refer to the baseline that was trained on the same rows.
        """
        space, candidates = self.space, self._candidates(best, refit)
        runners, artifacts, baselines = {}, dict[str, Path](), dict[str, str]()
        profile = target_profile(space.base)
        for name, candidate in candidates.items():
            runner = runners[name] = self.trials.run_recipe(space.recipe(candidate.point, refit=candidate.refit))
            paths = measurable(runner, profile.target.format, profile.options)
            # A baseline that was trained on other rows is a model of its own.
            other_rows = candidate.refit != refit and space.base.baseline in space.labels
            baselines[name] = _EARLIER if other_rows else BASELINE
            artifacts.setdefault(baselines[name], paths[BASELINE])
            artifacts[name] = paths[FINAL]
        # Bonferroni: the intervals of all models hold together.
        confidence, budget = 1 - 0.05 / len(candidates), timing_budget(space.search)
        session = TargetSession(runners[WINNER], profile, artifacts, TEST, confidence=confidence, budget_seconds=budget)
        # Time all models in one session, interleaved, so that disturbances affect them alike.
        rows = session.sizes() + session.accuracies([]) + judgements(session, [])
        timed, notes, machine = session.timings(remeasure=True)
        models = []
        for name, candidate in candidates.items():
            names = {baselines[name]: BASELINE, name: FINAL}
            measurements = [
                row.model_copy(update={"model": names[row.model]}) for row in rows + timed if row.model in names
            ]
            outcome = TrialOutcome.from_measurements(measurements)
            models.append(
                EvaluatedModel(
                    name=name, point=candidate.point, words=space.describe(candidate.point), final=outcome.final,
                    baseline=outcome.baseline, intervals=outcome.spread,
                    limits=tuple(self._check_limits(measurements, machine)), folder=str(artifacts[name]),
                )
            )  # fmt: skip
        return FinalResult(confidence=confidence, judged=tuple(models), refit=refit, notes=tuple(notes))

    def _retrain(self, best: Point, count: int, refit: bool) -> tuple[CompressError | None, list[SeedResult]]:
        """Refit the winner and train it with ``count`` further seeds.

        Seeds are evaluated on the test rows, each against its own baseline; nothing is timed. Workers evaluate the
        other models of the final evaluation meanwhile.

        Returns:
            The error of the refit or None, and the results of the seeds.
        """
        recipe, candidates = self.space.recipe, self._candidates(best, refit).values()
        # Seeds and the refit come first, so that workers evaluate the other models while these train.
        seeds = [recipe(best, seed=seed, refit=refit) for seed in self._further_seeds(count)]
        refits = [recipe(best, refit=True)] if refit else []
        others = [recipe(candidate.point) for candidate in candidates if not candidate.refit]
        answers = list(self.trials.evaluate_all([*refits, *seeds, *others], TEST))
        failed = next((answer for answer in answers[: len(refits)] if isinstance(answer, CompressError)), None)
        results = []
        for retrained, rows in zip(seeds, answers[len(refits) :], strict=False):
            if isinstance(rows, CompressError):
                error = first_line(rows)
                results.append(SeedResult(seed=retrained.seed, final={}, baseline={}, limits=(), error=error))
                continue
            # Nothing is timed for seeds, so limits on times are left out.
            metrics, outcome = {row.metric for row in rows}, TrialOutcome.from_measurements(rows)
            limits = tuple(limit for limit in self._check_limits(rows, {}) if limit.metric in metrics)
            results.append(
                SeedResult(seed=retrained.seed, final=outcome.final, baseline=outcome.baseline, limits=limits)
            )
        return failed, results

    def _check_limits(self, rows: Sequence[Measurement], machine: dict[str, object]) -> list[LimitResult]:
        """Check the limits of the search's target; ``machine`` describes the machine that measured times."""
        base = self.space.base
        machines = {target_profile(base).name: machine}
        return check_limits(self.engine.goal.limits, rows, base.baseline, machines=machines, verdicts=base.verdicts)
