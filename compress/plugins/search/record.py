"""Record of a search (`search.json`), which the page and the console table show, and its numbers as text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np

from compress.plugins.search.costs import CostEstimator
from compress.plugins.search.engine import Engine
from compress.plugins.search.final_evaluation import FinalResult
from compress.plugins.search.observations import LedgerEntry
from compress.plugins.search.outcome import Goal, TrialOutcome, constraint_margin, limit_name
from compress.plugins.search.space import Point, SearchSpace
from compress.plugins.search.surrogate import ParameterImportance, analyze_importance
from compress.report.limits import limit_text
from compress.report.tracking import TrackedRun
from compress.results.formatting import format_interval, format_value
from compress.results.metrics import describe_metric
from compress.results.report import LimitResult
from compress.utils.pydantic_models import Frozen


def format_limits(limits: Sequence[LimitResult]) -> tuple[str, ...]:
    """Format limits as `accuracy at least 97% of baseline: 98.20% of baseline`."""
    lines = []
    for limit in limits:
        is_relative = limit.ratio is not None and limit.of
        value = f"{limit.ratio:.2%} of {limit.of}" if is_relative else format_metric(limit.metric, limit.value)
        lines.append(f"{limit.metric} {limit.limit}: {value}")
    return tuple(lines)


def format_metric(metric: str, value: float | None) -> str:
    """Format the value of a metric for people."""
    return "not measured" if value is None else format_value(describe_metric(metric), value)


def format_objectives(
    minimize: Sequence[str], final: Mapping[str, float], spread: Mapping[str, tuple[float, float]]
) -> list[str]:
    """Format the objectives with their intervals: `latency 0.4 ms (0.38-0.42)`."""
    texts = []
    for name in filter(final.__contains__, minimize):
        metric = describe_metric(name)
        interval = format_interval(metric, *spread.get(name, (None, None)))
        text = f"{metric.title.lower()} {format_value(metric, final[name])}"
        texts.append(f"{text} ({interval})" if interval else text)
    return texts


def format_margin(limit: str, value: float, low: float) -> str:
    """Format a margin as `accuracy at least 0.97: +1.20% inside, surely +0.31%`."""
    return f"{limit}: {value:+.2%} inside" + ("" if low == value else f", surely {low:+.2%}")


def format_outcome(goal: Goal, outcome: TrialOutcome) -> list[str]:
    """Format the metrics of a trial on the selection rows: objectives, then every limit that was measured."""
    margins = goal.margins(outcome).items()
    lines = [format_margin(limit, room.value, room.low) for limit, room in margins if room is not None]
    return [*format_objectives(goal.minimize, outcome.final, outcome.spread), *lines]


Status = Literal["best", "front", "kept", "missed", "given up", "went on", "on its way", "failed"]


class ConstraintMargin(Frozen):
    """Margin of a limit with its interval, as a share of the bound; positive where the limit is met."""

    limit: str
    value: float
    low: float
    high: float


class TrialRecord(Frozen):
    """Trial with its recipe, share of training, metrics and stages.

    Each of ``stages`` holds label, key, seconds, and whether the stage was cached.
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
    """Whole search. ``errors`` are the relative errors of predictions by metric."""

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
    search, base, observations = space.search, space.base, engine.observations
    best = observations.best() if final is None else final.winner.point
    front = observations.pareto_front()
    nearest = None if best is not None else next(iter(observations.by_shortfall()), None)
    stage_costs = [cost for entry in entries for cost in entry.outcome.stages]
    importances, remaining = _importance(space, engine), engine.candidates.remaining_share
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
        knobs=_parameter_records(space, engine, importances),
        size=space.size,
        refused=space.rejected | {space.describe(point): why for point, why in engine.candidates.rejected.items()},
        trials=tuple(_trial(space, engine, entry, best, front) for entry in entries),
        errors={metric: tuple(errors) for metric, errors in costs.errors.items()},
        rough=costs.imprecision_reasons(),
        ended=engine.end_reason,
        best=None if best is None else space.describe(best),
        unsure=None if best is None or best in observations.feasible else _shortfall(space, engine, best),
        nearest=None if nearest is None else _shortfall(space, engine, nearest),
        final=final,
        bounds=_bounds(engine),
        left=None if remaining is None else round(remaining * space.size),
        explained={metric: importance.note for metric, importance in importances.items()},
        stages_run=sum(not cost.cached for cost in stage_costs),
        stages_shared=sum(cost.cached for cost in stage_costs),
    )


def _parameter_records(
    space: SearchSpace, engine: Engine, importances: Mapping[str, ParameterImportance]
) -> tuple[ParameterRecord, ...]:
    records = []
    for index, parameter in enumerate(space.parameters):
        importance = {
            metric: share
            for metric, result in importances.items()
            if result.shares is not None and (share := result.shares[index]) is not None
        }
        # The largest mean over the smallest, of the recipes of each value, by metric.
        effects = {}
        for metric in importances:
            # Group the finished recipes by the value of this parameter.
            groups = defaultdict[int, list[float]](list)
            for point, outcome in engine.observations.finished.items():
                if metric in outcome.final:
                    groups[point[index]].append(outcome.final[metric])
            means = [sum(values) / len(values) for values in groups.values()]
            if len(means) > 1 and min(means) > 0:
                effects[metric] = max(means) / min(means)
        values = tuple(map(str, parameter.values))
        records.append(ParameterRecord(name=parameter.name, values=values, effects=effects, importance=importance))
    return tuple(records)


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
            value = format_metric(limit.metric, outcome.final[limit.metric])
            bound = format_metric(limit.metric, limit.bound * base)
            surely = "" if room.low == room.value else f", {-room.low:.2%} with the required confidence"
            needed = f"{bound} or {'more' if limit.at_least is not None else 'less'}"
            parts.append(f"{limit.metric} is {value} and needs {needed} ({-room.value:.2%} short{surely})")
    return f"{space.describe(point)}: {'; '.join(parts)}"


def _importance(space: SearchSpace, engine: Engine) -> dict[str, ParameterImportance]:
    """Return the importance of parameters for each metric that is minimized or has a limit."""
    importances = {}
    for metric in dict.fromkeys([*engine.goal.minimize, *(limit.metric for limit in engine.goal.limits)]):
        finished = engine.observations.finished.items()
        measured = {point: outcome.final[metric] for point, outcome in finished if metric in outcome.final}
        values = np.array(list(measured.values()))
        # Choices multiply sizes and times, so that their effects add on a logarithmic scale.
        if not describe_metric(metric).quality and bool((values > 0).all()):
            values = np.log(values)
        importances[metric] = analyze_importance(space.parameters, list(measured), values)
    return importances


def _bounds(engine: Engine) -> dict[str, float]:
    """Return the upper bound of each metric; a bound relative to the baseline once that is measured."""
    first = next(iter(engine.observations.finished.values()), None)
    bounds: dict[str, float] = {}
    for limit in engine.goal.limits:
        # A relative limit has a bound once its baseline is measured.
        base = 1.0 if limit.of is None else None if first is None else first.baseline.get(limit.metric)
        if limit.at_most is not None and base is not None:
            bounds[limit.metric] = min(limit.bound * base, bounds.get(limit.metric, float("inf")))
    return bounds


def prediction_error_lines(record: SearchRecord) -> list[str]:
    """Describe the errors of predictions for people."""
    sizes = {describe_metric(metric).title: sorted(map(abs, errors)) for metric, errors in record.errors.items()}
    lines = [
        f"{title} was predicted within {values[-1]:.2%}, {values[len(values) // 2]:.2%} in the median, "
        f"for {len(values)} recipes"
        for title, values in sizes.items()
        if values
    ]
    return lines + [f"{describe_metric(metric).title}: {why}" for metric, why in record.rough.items()]


def tracked_run(record: SearchRecord, folder: Path) -> TrackedRun:
    """Return the search as an MLflow run, with each trial as a nested run."""
    winner = None if record.final is None else record.final.winner
    best = folder / "best.yaml"
    # MLflow compares runs by parameters and metrics, so trials are nested runs with their choices as parameters.
    return TrackedRun(
        name=record.name,
        metrics={} if winner is None else winner.final,
        spread={} if winner is None else winner.intervals,
        parameters={parameter.name: ", ".join(parameter.values) for parameter in record.knobs}
        | {"minimize": ", ".join(record.minimize), "limits": ", ".join(record.limits)},
        tags={
            "compress.folder": str(folder.resolve()),
            "compress.found": record.best or "no recipe meets every limit",
            "compress.keeps": str(winner is not None and winner.meets_limits).lower(),
            "compress.ended": record.ended,
        },
        files=tuple(path for path in (best, folder / "search.html") if path.is_file()),
        parts=tuple(_tracked_trial(trial, record) for trial in record.trials),
        failed=winner is None,
    )


def _tracked_trial(trial: TrialRecord, record: SearchRecord) -> TrackedRun:
    choices = zip(record.knobs, trial.point, strict=True)
    parameters = {parameter.name: parameter.values[index] for parameter, index in choices}
    margins = {f"inside {margin.limit}": margin.value for margin in trial.rooms}
    return TrackedRun(
        name=f"trial {trial.number}",
        metrics={**trial.final, **margins, "seconds": trial.seconds, "share_of_training": trial.share},
        spread={f"inside {margin.limit}": (margin.low, margin.high) for margin in trial.rooms},
        parameters=parameters,
        tags={"compress.status": trial.status, "compress.why": trial.reason, "compress.model": trial.model},
        failed=trial.status == "failed",
    )
