"""The record of a search (`search.json`), which the page and the console table show."""

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
from compress.plugins.search.formatting import format_metric
from compress.plugins.search.goal import limit_name
from compress.plugins.search.ledger import LedgerEntry
from compress.plugins.search.outcome import constraint_margin
from compress.plugins.search.parameter_importance import ParameterImportance, analyze_importance
from compress.plugins.search.space import Point, SearchSpace
from compress.report.limits import limit_text
from compress.report.tracking import TrackedRun
from compress.results.metrics import describe_metric
from compress.utils.pydantic_models import Frozen

Status = Literal["best", "front", "kept", "missed", "given up", "went on", "on its way", "failed"]


class ConstraintMargin(Frozen):
    """Margin of a limit with its interval, as a share of the bound; positive where the limit is met."""

    limit: str
    value: float
    low: float
    high: float


class TrialRecord(Frozen):
    """A trial: the recipe, how far it was trained, its metrics and stages. ``stages`` hold label, key, seconds
    and whether cached.
    """

    number: int
    words: str
    point: tuple[int, ...]
    share: float
    status: Status
    why: str = ""
    """Reason why it was tried."""
    reason: str = ""
    """Reason why it was not trained further."""
    final: dict[str, float] = {}
    spread: dict[str, tuple[float, float]] = {}
    """95% intervals of metrics that have one."""
    rooms: tuple[ConstraintMargin, ...] = ()
    seconds: float
    stages: tuple[tuple[str, str, float, bool], ...] = ()
    model: str = ""


class ParameterRecord(Frozen):
    """A search parameter with its values and effects.

    Attributes:
        name: Field as `--set` names it, or label of the stage.
        values: Values that the search may choose.
        effects: For each metric, the largest mean over the smallest, of recipes trained in full.
        importance: For each metric, the share of its variance that the parameter explains alone, where enough
            is known.
    """

    name: str
    values: tuple[str, ...]
    effects: dict[str, float]
    importance: dict[str, float] = {}


class SearchRecord(Frozen):
    """The whole search. ``errors`` are the relative errors of predictions by metric."""

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
    """Reason by metric why some recipes were predicted less precisely."""
    ended: str
    best: str | None
    unsure: str | None = None
    """Shortfall of the best recipe if the selection rows do not show with confidence that it meets its limits."""
    nearest: str | None = None
    final: FinalResult | None = None
    bounds: dict[str, float] = {}
    """Upper bound of each metric that has one."""
    explained: dict[str, str] = {}
    """Basis of the importance of parameters by metric, or the reason why there is none."""
    left: int | None = None
    """Number of untried recipes that predictions leave; an estimate where recipes cannot be enumerated."""
    past: dict[str, int] = {}
    """Sources of past trials, with their number."""
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
    """Return the record of a search so far.

    Args:
        space: Search space.
        engine: Engine with all outcomes.
        costs: Predictions and their errors.
        entries: Trials of the ledger.
        final: Result of the final evaluation; None before it.
        started: Start of the search.
    """
    search, base = space.search, space.base
    best, front = (
        engine.observations.best() if final is None else final.winner.point,
        engine.observations.pareto_front(),
    )
    nearest = None if best is not None else next(iter(engine.observations.by_shortfall()), None)
    stage_costs = [cost for entry in entries for cost in entry.outcome.stages]
    importances = _importance(space, engine)
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
                    for metric, importance in importances.items()
                    if importance.shares is not None and (share := importance.shares[index]) is not None
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
        past=dict(Counter(trial.source for trial in engine.candidates.past)),
        explained={metric: importance.note for metric, importance in importances.items()},
        stages_run=sum(not cost.cached for cost in stage_costs),
        stages_shared=sum(cost.cached for cost in stage_costs),
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
    """Describe the limits that a recipe misses: measured value, required value and difference."""
    outcome, parts = engine.observations.finished[point], []
    for limit in engine.goal.limits:
        room = constraint_margin(limit, outcome, engine.goal.confidence)
        if room is None:
            parts.append(f"{limit_name(limit)} was not measured")
        elif room.low < -1e-12:
            base = 1.0 if limit.of is None else outcome.baseline[limit.metric]
            has, needs = (
                format_metric(limit.metric, value) for value in (outcome.final[limit.metric], limit.bound * base)
            )
            surely = "" if room.low == room.value else f", {-room.low:.2%} as surely as is wanted"
            most = "more" if limit.at_least is not None else "less"
            parts.append(f"{limit.metric} is {has} and needs {needs} or {most} ({-room.value:.2%} short{surely})")
    return f"{space.describe(point)}: {'; '.join(parts)}"


def _effects(space: SearchSpace, engine: Engine, index: int) -> dict[str, float]:
    """Return for each metric the largest mean over the smallest, of the recipes of each value."""
    effects = {}
    finished = engine.observations.finished
    for metric in _metrics(engine):
        groups: dict[int, list[float]] = {}
        for point, outcome in finished.items():
            if metric in outcome.final:
                groups.setdefault(point[index], []).append(outcome.final[metric])
        means = [sum(values) / len(values) for values in groups.values()]
        if len(means) > 1 and min(means) > 0:
            effects[metric] = max(means) / min(means)
    return effects


def _metrics(engine: Engine) -> list[str]:
    """Return every metric that is minimized or has a limit."""
    return list(dict.fromkeys([*engine.goal.minimize, *(limit.metric for limit in engine.goal.limits)]))


def _importance(space: SearchSpace, engine: Engine) -> dict[str, ParameterImportance]:
    """Return the importance of parameters for each metric; sizes and times enter as logarithms, since choices
    multiply them.
    """
    importances = {}
    for metric in _metrics(engine):
        measured = {
            point: outcome.final[metric]
            for point, outcome in engine.observations.finished.items()
            if metric in outcome.final
        }
        values = np.array(list(measured.values()))
        is_logarithmic = not describe_metric(metric).quality and bool((values > 0).all())
        importances[metric] = analyze_importance(
            space.parameters, list(measured), np.log(values) if is_logarithmic else values
        )
    return importances


def _bounds(engine: Engine) -> dict[str, float]:
    """Return the upper bound of each metric; a bound relative to the baseline once that is measured."""
    first = next(iter(engine.observations.finished.values()), None)
    bounds: dict[str, float] = {}
    for limit in engine.goal.limits:
        base = 1.0 if limit.of is None else None if first is None else first.baseline.get(limit.metric)
        if limit.at_most is not None and base is not None:
            bounds[limit.metric] = min(limit.bound * base, bounds.get(limit.metric, float("inf")))
    return bounds


def prediction_error_lines(record: SearchRecord) -> list[str]:
    """Describe the errors of predictions for people."""
    lines = []
    for metric, errors in record.errors.items():
        sizes: Sequence[float] = sorted(map(abs, errors))
        if sizes:
            lines.append(
                f"{describe_metric(metric).title} was foretold within {sizes[-1]:.2%}, {sizes[len(sizes) // 2]:.2%} in "
                f"the median, for {len(sizes)} recipes"
            )
    return lines + [f"{describe_metric(metric).title}: {why}" for metric, why in record.rough.items()]


def tracked_run(record: SearchRecord, folder: Path) -> TrackedRun:
    """Return the search as an MLflow run, with each trial as a nested run."""
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
    parameters = {
        parameter.name: parameter.values[index] for parameter, index in zip(record.knobs, trial.point, strict=True)
    }
    margins = {f"inside {margin.limit}": margin.value for margin in trial.rooms}
    return TrackedRun(
        name=f"trial {trial.number}",
        metrics={**trial.final, **margins, "seconds": trial.seconds, "share_of_training": trial.share},
        spread={f"inside {margin.limit}": (margin.low, margin.high) for margin in trial.rooms},
        parameters=parameters,
        tags={"compress.status": trial.status, "compress.why": trial.reason, "compress.model": trial.model},
        failed=trial.status == "failed",
    )
