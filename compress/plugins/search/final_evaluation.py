"""The end of a search: one session on the test rows, which nothing was chosen by, over what was declared before."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from compress.data.dataset import TEST
from compress.pipeline.formats import measurable
from compress.pipeline.image_generation_evals import judgements
from compress.pipeline.target_session import TargetSession
from compress.plugins.search.engine import Engine
from compress.plugins.search.outcome import figures
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
