"""The end of a search: one session on the test rows, which nothing was chosen by, over what was declared before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from compress.data.dataset import TEST
from compress.pipeline.formats import measurable
from compress.pipeline.image_generation_evals import judgements
from compress.pipeline.target_session import TargetSession
from compress.plugins.ray.jobs import Journey
from compress.plugins.search.costs import CostEstimator
from compress.plugins.search.engine import Engine
from compress.plugins.search.outcome import figures
from compress.plugins.search.refit import Refit
from compress.plugins.search.space import Point, SearchSpace
from compress.plugins.search.trial import TrialRunner, target_profile
from compress.recipe.recipe import Recipe
from compress.recipe.search import Search
from compress.report.limits import check_limits
from compress.results.measurement import Measurement
from compress.results.report import BASELINE, FINAL, LimitResult
from compress.utils.errors import CompressError, first_line
from compress.utils.pydantic_models import Frozen

FRONT = 3
WINNER, CHOSEN, ORIGIN = "winner", "as chosen", "trial 0"
_EARLIER = "the trials' baseline"
_TIMING_SECONDS, _TIMING_SHARE = 60.0, 0.2
"""What taking times usually takes at the end, and the part of a short search that it may take."""


class FinalCandidate(NamedTuple):
    """A model of the last session. With ``refit`` it has learned from the rows that chose too."""

    point: Point
    refit: bool = False


class EvaluatedModel(Frozen):
    """One model of the last session. ``intervals`` are of so much confidence that all of them hold together at 95%."""

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
        """Whether no limit was missed."""
        return not any(limit.missed for limit in self.limits)


class SeedResult(Frozen):
    """The winner, trained again with another seed, baseline and all."""

    seed: int
    final: dict[str, float]
    baseline: dict[str, float]
    limits: tuple[LimitResult, ...]
    error: str | None = None


class FinalResult(Frozen):
    """What the test rows say."""

    confidence: float
    judged: tuple[EvaluatedModel, ...]
    refit: bool = False
    """Whether the winner, and its further seeds, learned from the rows that chose too."""
    seeds: tuple[SeedResult, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def winner(self) -> EvaluatedModel:
        """The first is the winner."""
        return self.judged[0]


def select_models(engine: Engine, best: Point, refit: bool = False) -> dict[str, FinalCandidate]:
    """The models of the last session by name: the winner, where the search began, and up to three more of the front.

    Of a winner that is trained anew, what it was before too.
    """
    chosen = {WINNER: FinalCandidate(best, refit)}
    if refit:
        chosen[CHOSEN] = FinalCandidate(best)
    if best != engine.space.origin:
        chosen[ORIGIN] = FinalCandidate(engine.space.origin)
    others = [
        point for point in engine.observations.pareto_front() if point not in {one.point for one in chosen.values()}
    ]
    spread = others if len(others) <= FRONT else [others[0], others[len(others) // 2], others[-1]]
    return chosen | {f"front {place}": FinalCandidate(point) for place, point in enumerate(spread, 1)}


def judge(space: SearchSpace, engine: Engine, best: Point, trials: TrialRunner, refit: bool = False) -> FinalResult:
    """Evaluate and time the winner and the others side by side on the test rows. There is no second pick.

    Limits on a share of the baseline are on that of the baseline that learned from the same rows.
    """
    entrants = select_models(engine, best, refit)
    roads, artifacts, baselines = {}, dict[str, Path](), dict[str, str]()
    profile = target_profile(space.base)
    for name, one in entrants.items():
        runner = roads[name] = trials.run_recipe(space.recipe(one.point, refit=one.refit))
        made = measurable(runner, profile.target.format, profile.options)
        other_rows = one.refit != refit and space.base.baseline in space.labels
        baselines[name] = _EARLIER if other_rows else BASELINE
        artifacts.setdefault(baselines[name], made[BASELINE])
        artifacts[name] = made[FINAL]
    confidence = 1 - 0.05 / len(entrants)
    session = TargetSession(
        roads[WINNER], profile, artifacts, TEST, confidence=confidence, budget_seconds=timing_budget(space.search)
    )
    rows = session.sizes() + session.accuracies([]) + judgements(session, [])
    timed, notes, machine = session.timings(remeasure=True)
    rows += timed
    judged = []
    for name, one in entrants.items():
        names = {baselines[name]: BASELINE, name: FINAL}
        own = [row.model_copy(update={"model": names[row.model]}) for row in rows if row.model in names]
        judged.append(
            EvaluatedModel(
                name=name,
                point=one.point,
                words=space.describe(one.point),
                intervals={row.metric: (row.low, row.high) for row in own if row.model == FINAL and row.low is not None
                           and row.high is not None},
                limits=tuple(_limits(engine, own, space, profile.name, machine)),
                folder=str(artifacts[name]),
                **_of(own),
            )
        )  # fmt: skip
    return FinalResult(confidence=confidence, judged=tuple(judged), refit=refit, notes=tuple(notes))


def expected_timing_seconds(search: Search) -> float:
    """What taking times at the end will take, about."""
    return min(_TIMING_SECONDS, _TIMING_SHARE * search.seconds)


def timing_budget(search: Search) -> float | None:
    """The budget of that, where the search is so short that it needs one."""
    seconds = expected_timing_seconds(search)
    return seconds if seconds < _TIMING_SECONDS else None


def retrain(
    space: SearchSpace, engine: Engine, best: Point, trials: TrialRunner, count: int, refit: bool
) -> tuple[CompressError | None, list[SeedResult]]:
    """The winner made from all rows, with ``refit``, and of further seeds; what the first failed by, and the seeds.

    Seeds are judged on the test rows, each against its own baseline; nothing is timed. Workers judge the others of the
    last session meanwhile.
    """
    seeds = [space.recipe(best, seed=seed, refit=refit) for seed in additional_seeds(space.base, count)]
    whole = [space.recipe(best, refit=True)] if refit else []
    others = [space.recipe(one.point) for one in select_models(engine, best, refit).values() if not one.refit]
    answers = list(trials.evaluate_all([*whole, *seeds, *others], TEST))
    failed = next((one for one in answers[: len(whole)] if isinstance(one, CompressError)), None)
    return failed, [_seed(space, engine, *one) for one in zip(seeds, answers[len(whole) :], strict=False)]


def _seed(space: SearchSpace, engine: Engine, recipe: Recipe, rows: list[Measurement] | CompressError) -> SeedResult:
    if isinstance(rows, CompressError):
        return SeedResult(seed=recipe.seed, final={}, baseline={}, limits=(), error=first_line(rows))
    known = {row.metric for row in rows}
    limits = [one for one in _limits(engine, rows, space, target_profile(recipe).name, {}) if one.metric in known]
    return SeedResult(seed=recipe.seed, limits=tuple(limits), **_of(rows))


def additional_seeds(recipe: Recipe, count: int) -> range:
    """The seeds that follow the recipe's own."""
    return range(recipe.seed + 1, recipe.seed + 1 + count)


def _limits(
    engine: Engine, rows: Sequence[Measurement], space: SearchSpace, target: str, machine: dict[str, object]
) -> list[LimitResult]:
    return check_limits(
        engine.goal.limits, rows, space.base.baseline, machines={target: machine}, verdicts=space.base.verdicts
    )


def _of(rows: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    told = figures(rows, ())
    return {"final": dict(told["final"]), "baseline": dict(told["baseline"])}  # type: ignore[call-overload]


_SESSION_MODELS = 2.0
"""Models that the session is thought to judge, as long as it takes to judge and time one of a trial."""


@dataclass
class FinalEvaluation:
    """Of one search."""

    space: SearchSpace
    costs: CostEstimator
    engine: Engine
    trials: TrialRunner
    refit: Refit

    @property
    def seeds(self) -> int:
        """How many further ones the winner is trained with; none where nothing is trained."""
        return self.space.search.seeds if len(self.engine.shares) > 1 else 0

    def prefetch_jobs(self) -> list[Journey]:
        """What it needs whatever is found: the baselines of further seeds, and of the winner's refit."""
        base = self.space.base
        if base.baseline not in self.space.labels:
            return []
        seeds = [base.seed] * self.refit.enabled + [*additional_seeds(base, self.seeds)]
        return [Journey(self.refit.recipe(self.space.origin, seed), until=base.baseline) for seed in seeds]

    def reserved_seconds(self) -> float:
        """Seconds that it will take: tests and times, the likely winner's refit and its further seeds.

        While there is no winner, trials that may find one come before seeds.
        """
        session, known = self._session_seconds(), self.engine.observations
        ranked = known.ranked()
        again = self.refit.enabled + (self.seeds if ranked else 0)
        if not again:
            return session
        likely = next(iter(ranked or known.by_shortfall()), self.space.origin)
        return session + min(again * self._again_seconds(likely), 0.5 * self.space.search.seconds)

    def _session_seconds(self) -> float:
        return expected_timing_seconds(self.space.search) + _SESSION_MODELS * self.costs.evaluation_seconds

    def _again_seconds(self, point: Point) -> float:
        """Of training a recipe once more, about."""
        return (1 + self.refit.more_rows if self.refit.enabled else 1) * self.costs.corrected_total_seconds(point)

    def affordable_seeds(self, best: Point, refit: bool, left: float) -> int:
        """How many further seeds ``left`` seconds are enough for, beside the refit and the session."""
        each = max(self._again_seconds(best), 1e-9)
        trainings = int((left - self._session_seconds()) * self.trials.workers.width / each)
        return min(self.seeds, max(0, trainings - refit))

    def run(self, note: Callable[[str], None], say: Callable[[str], None], left: float) -> FinalResult | None:
        """What the test rows say of the winner; None where no recipe's figures keep every limit.

        Of its further seeds as many are trained as ``left`` seconds are enough for.
        """
        pick = next(iter(self.engine.observations.ranked()), None)
        if pick is None:
            return None
        best, refit, seeds = *self._winner(pick), list[SeedResult]()
        again = ["from the rows that chose it too"] * refit
        count = self.affordable_seeds(best, refit, left)
        if count < self.seeds:
            note(f"there is time for {count or 'none'} of the winner's {self.seeds} further training seeds")
        if count:
            again.append(f"of {count} more training seed{'s'[: count > 1]}")
        if again:
            say(f"the winner again, {' and '.join(again)}")
            failed, seeds = retrain(self.space, self.engine, best, self.trials, count, refit)
            if failed is not None:
                note(f"that failed, so it ships as it was chosen: {first_line(failed)}")
                # Further seeds were asked to learn from all rows too.
                best, refit, seeds = pick, False, []
        # Nothing may run here while times are taken.
        self.trials.workers.rest()
        say(f"the session at the end, on the test rows: {self.space.describe(best)}")
        final = judge(self.space, self.engine, best, self.trials, refit)
        return final.model_copy(update={"seeds": tuple(seeds)})

    def _winner(self, pick: Point) -> tuple[Point, bool]:
        """What ships, and whether it learns from all rows: the pick, or what is next to it and not too large then."""
        known = self.engine.observations
        trained = (point for point in known.ranked() if self.refit.enabled and self.space.trains(point))
        best = next((point for point in trained if self.refit.fits_limits(point, known)), None)
        return (pick, False) if best is None else (best, True)
