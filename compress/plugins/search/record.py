"""`search.json`: everything that a search knows, of which its page and the console's table are views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np

from compress.plugins.search.costs import CostEstimator
from compress.plugins.search.engine import Engine
from compress.plugins.search.final_evaluation import FinalResult
from compress.plugins.search.formatting import figure
from compress.plugins.search.goal import limit_name
from compress.plugins.search.ledger import LedgerEntry
from compress.plugins.search.outcome import constraint_margin
from compress.plugins.search.parameter_importance import ParameterImportance, importance
from compress.plugins.search.space import Point, SearchSpace
from compress.report.limits import limit_text
from compress.report.tracking import TrackedRun
from compress.results.metrics import describe_metric
from compress.utils.pydantic_models import Frozen

Status = Literal["best", "front", "kept", "missed", "given up", "went on", "on its way", "failed"]


class ConstraintMargin(Frozen):
    """How far inside a limit a trial lies, as a share of the bound, and how far surely."""

    limit: str
    value: float
    low: float
    high: float


class TrialRecord(Frozen):
    """A recipe that was tried, as far as it came. ``share`` is that of its training; ``stages`` say what was shared."""

    number: int
    words: str
    point: tuple[int, ...]
    share: float
    status: Status
    why: str = ""
    """Why it was tried."""
    reason: str = ""
    """Why it went no further."""
    final: dict[str, float] = {}
    spread: dict[str, tuple[float, float]] = {}
    """95% intervals, of figures that have one."""
    rooms: tuple[ConstraintMargin, ...] = ()
    seconds: float
    stages: tuple[tuple[str, str, float, bool], ...] = ()
    model: str = ""


class ParameterRecord(Frozen):
    """A choice, its values, and how much it moved each figure: largest mean over smallest, of recipes in full.

    ``importance`` is the share of a figure's variance that it explains alone, where enough is known.
    """

    name: str
    values: tuple[str, ...]
    effects: dict[str, float]
    importance: dict[str, float] = {}


class SearchRecord(Frozen):
    """The whole search. ``errors`` are how far predictions were off, relative, by metric."""

    version: int = 1
    name: str
    description: str
    started: str
    moment: str
    seconds: float
    budget_seconds: float
    minimize: tuple[str, ...]
    limits: tuple[str, ...]
    confidence: float
    rows: int
    knobs: tuple[ParameterRecord, ...]
    size: int
    refused: dict[str, str]
    trials: tuple[TrialRecord, ...]
    errors: dict[str, tuple[float, ...]]
    rough: dict[str, str] = {}
    """Metric -> why recipes, or some of them, were foretold more roughly than they might be."""
    ended: str
    best: str | None
    unsure: str | None = None
    """By how much the rows that choose leave open whether the best keeps its limits; None where they don't."""
    nearest: str | None = None
    final: FinalResult | None = None
    bounds: dict[str, float] = {}
    """The most that a figure may be, of those with such a limit."""
    explained: dict[str, str] = {}
    """Metric -> what the importance of choices rests on, or why there is none."""
    left: int | None = None
    """How many recipes predictions leave, which nobody has tried; an estimate where they can't be listed."""
    past: dict[str, int] = {}
    """What said where to look first, with how many trials of it."""
    stages_run: int = 0
    stages_shared: int = 0


def build_record(
    space: SearchSpace,
    engine: Engine,
    costs: CostEstimator,
    entries: Sequence[LedgerEntry],
    final: FinalResult | None,
    started: datetime,
) -> SearchRecord:
    """Everything so far."""
    search, base = space.search, space.base
    best, front = (
        engine.observations.best() if final is None else final.winner.point,
        engine.observations.pareto_front(),
    )
    nearest = None if best is not None else next(iter(engine.observations.by_shortfall()), None)
    ran = [cost for entry in entries for cost in entry.outcome.stages]
    matters = _importance(space, engine)
    return SearchRecord(
        name=base.name,
        description=base.description,
        started=started.isoformat(timespec="seconds"),
        moment=datetime.now(UTC).astimezone().isoformat(timespec="seconds"),
        seconds=sum(entry.outcome.seconds for entry in entries),
        budget_seconds=search.seconds,
        minimize=engine.goal.minimize,
        limits=tuple(f"{limit.metric} {limit_text(limit)}" for limit in engine.goal.limits),
        confidence=engine.goal.confidence,
        rows=search.select.rows,
        knobs=tuple(
            ParameterRecord(
                name=parameter.name,
                values=tuple(map(str, parameter.values)),
                effects=_effects(space, engine, index),
                importance={
                    metric: share
                    for metric, found in matters.items()
                    if found.shares is not None and (share := found.shares[index]) is not None
                },
            )
            for index, parameter in enumerate(space.parameters)
        ),
        size=space.size,
        refused=space.rejected | {space.describe(point): why for point, why in engine.candidates.rejected.items()},
        trials=tuple(_trial(space, engine, entry, best, front) for entry in entries),
        errors={metric: tuple(errors) for metric, errors in costs.errors.items()},
        rough=costs.imprecision_reasons(),
        ended=engine.end_reason,
        best=None if best is None else space.describe(best),
        unsure=None if best is None or best in engine.observations.feasible else _shortfall(space, engine, best),
        nearest=None if nearest is None else _shortfall(space, engine, nearest),
        final=final,
        bounds=_bounds(engine),
        left=None
        if engine.candidates.remaining_share is None
        else round(engine.candidates.remaining_share * space.size),
        past=dict(Counter(one.source for one in engine.candidates.past)),
        explained={metric: found.note for metric, found in matters.items()},
        stages_run=sum(not cost.cached for cost in ran),
        stages_shared=sum(cost.cached for cost in ran),
    )


def _trial(
    space: SearchSpace, engine: Engine, entry: LedgerEntry, best: Point | None, front: Sequence[Point]
) -> TrialRecord:
    outcome, point = entry.outcome, entry.point
    return TrialRecord(
        number=entry.number,
        words=entry.words,
        point=point,
        share=engine.shares[entry.rung],
        status=_status(engine, entry, best, front),
        reason=outcome.error or engine.stopped.get(point, ""),
        why=entry.why,
        final=outcome.final,
        spread=outcome.spread,
        rooms=tuple(
            ConstraintMargin(limit=limit, value=room.value, low=room.low, high=room.high)
            for limit, room in engine.observations.margins.get((point, entry.rung), {}).items()
            if room is not None
        ),
        seconds=outcome.seconds,
        stages=tuple((cost.label, cost.key, cost.seconds, cost.cached) for cost in outcome.stages),
        model=outcome.model,
    )


def _status(engine: Engine, entry: LedgerEntry, best: Point | None, front: Sequence[Point]) -> Status:
    if entry.outcome.error is not None:
        return "failed"
    if entry.rung < engine.full_rung:
        if entry.point in engine.stopped:
            return "given up"
        return "went on" if (entry.point, entry.rung + 1) in engine.observations.outcomes else "on its way"
    if entry.point == best:
        return "best"
    if entry.point in front:
        return "front"
    return "kept" if entry.point in engine.observations.feasible else "missed"


def _shortfall(space: SearchSpace, engine: Engine, point: Point) -> str:
    """Of the nearest recipe: every limit that it misses, what it has and what it would need."""
    outcome, parts = engine.observations.finished[point], []
    for limit in engine.goal.limits:
        room = constraint_margin(limit, outcome, engine.goal.confidence)
        if room is None:
            parts.append(f"{limit_name(limit)} was not measured")
        elif room.low < -1e-12:
            base = 1.0 if limit.of is None else outcome.baseline[limit.metric]
            has, needs = (figure(limit.metric, value) for value in (outcome.final[limit.metric], limit.bound * base))
            surely = "" if room.low == room.value else f", {-room.low:.2%} as surely as is wanted"
            most = "more" if limit.at_least is not None else "less"
            parts.append(f"{limit.metric} is {has} and needs {needs} or {most} ({-room.value:.2%} short{surely})")
    return f"{space.describe(point)}: {'; '.join(parts)}"


def _effects(space: SearchSpace, engine: Engine, index: int) -> dict[str, float]:
    """Metric -> the largest mean of it over the smallest, of the recipes of each value."""
    found = {}
    finished = engine.observations.finished
    for metric in _metrics(engine):
        groups: dict[int, list[float]] = {}
        for point, outcome in finished.items():
            if metric in outcome.final:
                groups.setdefault(point[index], []).append(outcome.final[metric])
        means = [sum(values) / len(values) for values in groups.values()]
        if len(means) > 1 and min(means) > 0:
            found[metric] = max(means) / min(means)
    return found


def _metrics(engine: Engine) -> list[str]:
    """Every figure that is minimized or has a limit."""
    return list(dict.fromkeys([*engine.goal.minimize, *(limit.metric for limit in engine.goal.limits)]))


def _importance(space: SearchSpace, engine: Engine) -> dict[str, ParameterImportance]:
    """Of every figure; of sizes and times their logarithms, since choices multiply them."""
    found = {}
    for metric in _metrics(engine):
        known = {point: one.final[metric] for point, one in engine.observations.finished.items() if metric in one.final}
        values = np.array(list(known.values()))
        multiplied = not describe_metric(metric).quality and bool((values > 0).all())
        found[metric] = importance(space.parameters, list(known), np.log(values) if multiplied else values)
    return found


def _bounds(engine: Engine) -> dict[str, float]:
    """The most that each figure may be; a limit of the baseline's is one once that is measured."""
    first = next(iter(engine.observations.finished.values()), None)
    found: dict[str, float] = {}
    for limit in engine.goal.limits:
        base = 1.0 if limit.of is None else None if first is None else first.baseline.get(limit.metric)
        if limit.at_most is not None and base is not None:
            found[limit.metric] = min(limit.bound * base, found.get(limit.metric, float("inf")))
    return found


def prediction_error_lines(record: SearchRecord) -> list[str]:
    """How far predictions were off, for people."""
    told = []
    for metric, errors in record.errors.items():
        sizes: Sequence[float] = sorted(map(abs, errors))
        if sizes:
            told.append(
                f"{describe_metric(metric).title} was foretold within {sizes[-1]:.2%}, {sizes[len(sizes) // 2]:.2%} in "
                f"the median, for {len(sizes)} recipes"
            )
    return told + [f"{describe_metric(metric).title}: {why}" for metric, why in record.rough.items()]


def tracked_run(record: SearchRecord, folder: Path) -> TrackedRun:
    """The winner's figures on the test rows, and those of every trial on the rows that chose."""
    winner = None if record.final is None else record.final.winner
    best = folder / "best.yaml"
    return TrackedRun(
        name=record.name,
        metrics={} if winner is None else winner.final,
        spread={} if winner is None else winner.intervals,
        parameters={parameter.name: ", ".join(parameter.values) for parameter in record.knobs}
        | {"minimize": ", ".join(record.minimize), "limits": ", ".join(record.limits)},
        tags={
            "compress.folder": str(folder.resolve()),
            "compress.found": record.best or "nothing keeps every limit",
            "compress.keeps": str(winner is not None and winner.meets_limits).lower(),
            "compress.ended": record.ended,
        },
        files=tuple(path for path in (best, folder / "search.html") if path.is_file()),
        parts=tuple(_tracked_trial(trial, record) for trial in record.trials),
        failed=winner is None,
    )


def _tracked_trial(trial: TrialRecord, record: SearchRecord) -> TrackedRun:
    chosen = {
        parameter.name: parameter.values[place] for parameter, place in zip(record.knobs, trial.point, strict=True)
    }
    room = {f"inside {each.limit}": each.value for each in trial.rooms}
    return TrackedRun(
        name=f"trial {trial.number}",
        metrics={**trial.final, **room, "seconds": trial.seconds, "share_of_training": trial.share},
        spread={f"inside {each.limit}": (each.low, each.high) for each in trial.rooms},
        parameters=chosen,
        tags={"compress.status": trial.status, "compress.why": trial.reason, "compress.model": trial.model},
        failed=trial.status == "failed",
    )
