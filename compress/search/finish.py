"""The end of a search: one session on the test rows, which nothing was chosen by, over what was declared before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from compress.data.dataset import TEST
from compress.errors import CompressError, first_line
from compress.frozen import Frozen
from compress.measurement import Measurement
from compress.pipeline.drawn import judgements
from compress.pipeline.formats import measurable
from compress.pipeline.target_session import TargetSession
from compress.recipe.recipe import Recipe
from compress.report.limits import check_limits
from compress.report.schema import BASELINE, FINAL, LimitResult
from compress.search.engine import Engine
from compress.search.outcome import figures
from compress.search.space import Point, Space
from compress.search.trial import Trials, target_profile

FRONT = 3
WINNER, ORIGIN = "winner", "trial 0"


class Judged(Frozen):
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
    def keeps(self) -> bool:
        """Whether no limit was missed."""
        return not any(limit.missed for limit in self.limits)


class Seed(Frozen):
    """The winner, trained again with another seed, baseline and all."""

    seed: int
    final: dict[str, float]
    baseline: dict[str, float]
    limits: tuple[LimitResult, ...]
    error: str | None = None


class Final(Frozen):
    """What the test rows say."""

    confidence: float
    judged: tuple[Judged, ...]
    seeds: tuple[Seed, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def winner(self) -> Judged:
        """The first is the winner."""
        return self.judged[0]


def declared(engine: Engine, best: Point) -> dict[str, Point]:
    """The models of the last session by name: the winner, where the search began, and up to three more of the front."""
    chosen = {WINNER: best}
    if best != engine.space.origin:
        chosen[ORIGIN] = engine.space.origin
    others = [point for point in engine.known.front() if point not in chosen.values()]
    spread = others if len(others) <= FRONT else [others[0], others[len(others) // 2], others[-1]]
    return chosen | {f"front {place}": point for place, point in enumerate(spread, 1)}


def judge(space: Space, engine: Engine, best: Point, trials: Trials) -> Final:
    """Evaluate and time the winner and the others side by side on the test rows. There is no second pick."""
    points = declared(engine, best)
    roads = {}
    artifacts: dict[str, Path] = {}
    profile = target_profile(space.base)
    for name, point in points.items():
        road = roads[name] = trials.travelled(space.recipe(point))
        made = measurable(road, profile.target.format, profile.options)
        artifacts.setdefault(BASELINE, made[BASELINE])
        artifacts[name] = made[FINAL]
    confidence = 1 - 0.05 / len(points)
    session = TargetSession(roads[WINNER], profile, artifacts, TEST, confidence=confidence)
    rows = session.sizes() + session.accuracies([]) + judgements(session, [])
    timed, notes, machine = session.timings(remeasure=True)
    rows += timed
    judged = []
    for name, point in points.items():
        own = [_renamed(row, name) for row in rows if row.model in (name, BASELINE)]
        judged.append(
            Judged(
                name=name,
                point=point,
                words=space.words(point),
                intervals={row.metric: (row.low, row.high) for row in own if row.model == FINAL and row.low is not None
                           and row.high is not None},
                limits=tuple(_limits(engine, own, space, profile.name, machine)),
                folder=str(artifacts[name]),
                **_of(own),
            )
        )  # fmt: skip
    return Final(confidence=confidence, judged=tuple(judged), notes=tuple(notes))


def other_seeds(space: Space, engine: Engine, best: Point, trials: Trials, count: int) -> Iterator[Seed]:
    """The winner of further seeds, judged on the test rows, each against its own baseline; nothing is timed."""
    recipes = [space.recipe(best, seed=seed) for seed in further_seeds(space.base, count)]
    for recipe, rows in zip(recipes, trials.answers(recipes, TEST), strict=True):
        if isinstance(rows, CompressError):
            yield Seed(seed=recipe.seed, final={}, baseline={}, limits=(), error=first_line(rows))
            continue
        known = {row.metric for row in rows}
        limits = [one for one in _limits(engine, rows, space, target_profile(recipe).name, {}) if one.metric in known]
        yield Seed(seed=recipe.seed, limits=tuple(limits), **_of(rows))


def further_seeds(recipe: Recipe, count: int) -> range:
    """The seeds that follow the recipe's own."""
    return range(recipe.seed + 1, recipe.seed + 1 + count)


def _limits(
    engine: Engine, rows: Sequence[Measurement], space: Space, target: str, machine: dict[str, object]
) -> list[LimitResult]:
    return check_limits(
        engine.goal.limits, rows, space.base.baseline, machines={target: machine}, verdicts=space.base.verdicts
    )


def _renamed(row: Measurement, name: str) -> Measurement:
    return row.model_copy(update={"model": FINAL}) if row.model == name else row


def _of(rows: Sequence[Measurement]) -> dict[str, dict[str, float]]:
    told = figures(rows, ())
    return {"final": dict(told["final"]), "baseline": dict(told["baseline"])}  # type: ignore[call-overload]
