"""`search.json`: everything that a search knows, of which its page and the console's table are views."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

from compress.frozen import Frozen
from compress.report.limits import limit_text
from compress.search.costs import Costs
from compress.search.engine import Engine
from compress.search.finish import Final
from compress.search.goal import named
from compress.search.ledger import Entry
from compress.search.outcome import slack
from compress.search.space import Point, Space

Status = Literal["best", "front", "kept", "missed", "given up", "went on", "on its way", "failed"]


class Room(Frozen):
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
    reason: str = ""
    final: dict[str, float] = {}
    rooms: tuple[Room, ...] = ()
    seconds: float
    stages: tuple[tuple[str, str, float, bool], ...] = ()
    model: str = ""


class KnobRecord(Frozen):
    """A choice, its values, and how much it moved each figure: largest mean over smallest, of recipes in full."""

    name: str
    values: tuple[str, ...]
    effects: dict[str, float]


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
    knobs: tuple[KnobRecord, ...]
    size: int
    refused: dict[str, str]
    trials: tuple[TrialRecord, ...]
    errors: dict[str, tuple[float, ...]]
    rough: dict[str, str] = {}
    """Metric -> why recipes, or some of them, were foretold more roughly than they might be."""
    ended: str
    best: str | None
    nearest: str | None = None
    final: Final | None = None
    stages_run: int = 0
    stages_shared: int = 0


def record_of(
    space: Space, engine: Engine, costs: Costs, entries: Sequence[Entry], final: Final | None, started: datetime
) -> SearchRecord:
    """Everything so far."""
    search, base = space.search, space.base
    best, front = engine.known.best(), engine.known.front()
    nearest = None if best is not None else engine.known.nearest()
    ran = [cost for entry in entries for cost in entry.outcome.stages]
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
            KnobRecord(name=knob.name, values=tuple(map(str, knob.values)), effects=_effects(space, engine, index))
            for index, knob in enumerate(space.knobs)
        ),
        size=space.size,
        refused=space.refused | {space.words(point): why for point, why in engine.refused.items()},
        trials=tuple(_trial(space, engine, entry, best, front) for entry in entries),
        errors={metric: tuple(errors) for metric, errors in costs.errors.items()},
        rough=costs.why_not(),
        ended=engine.ended,
        best=None if best is None else space.words(best),
        nearest=None if nearest is None else _shortfall(space, engine, nearest),
        final=final,
        stages_run=sum(not cost.cached for cost in ran),
        stages_shared=sum(cost.cached for cost in ran),
    )


def _trial(space: Space, engine: Engine, entry: Entry, best: Point | None, front: Sequence[Point]) -> TrialRecord:
    outcome, point = entry.outcome, entry.point
    return TrialRecord(
        number=entry.number,
        words=entry.words,
        point=point,
        share=engine.shares[entry.rung],
        status=_status(engine, entry, best, front),
        reason=outcome.error or engine.given_up.get(point, ""),
        final=outcome.final,
        rooms=tuple(
            Room(limit=named(limit), value=room.value, low=room.low, high=room.high)
            for limit in engine.goal.limits
            if (room := slack(limit, outcome, engine.goal.confidence)) is not None
        ),
        seconds=outcome.seconds,
        stages=tuple((cost.label, cost.key, cost.seconds, cost.cached) for cost in outcome.stages),
        model=outcome.model,
    )


def _status(engine: Engine, entry: Entry, best: Point | None, front: Sequence[Point]) -> Status:
    if entry.outcome.error is not None:
        return "failed"
    if entry.rung < engine.full:
        if entry.point in engine.given_up:
            return "given up"
        return "went on" if (entry.point, entry.rung + 1) in engine.known.outcomes else "on its way"
    if entry.point == best:
        return "best"
    if entry.point in front:
        return "front"
    return "kept" if engine.goal.keeps(entry.outcome) else "missed"


def _shortfall(space: Space, engine: Engine, point: Point) -> str:
    """What the nearest recipe would need: the limit that it misses by most."""
    short = engine.goal.shortfalls(engine.known.finished[point])
    limit, by = max(short.items(), key=lambda item: item[1])
    return f"{space.words(point)}: {limit} is short by {by:.2%}, as surely as is wanted"


def _effects(space: Space, engine: Engine, index: int) -> dict[str, float]:
    """Metric -> the largest mean of it over the smallest, of the recipes of each value."""
    found = {}
    finished = engine.known.finished
    metrics = [*engine.goal.minimize, *(limit.metric for limit in engine.goal.limits)]
    for metric in dict.fromkeys(metrics):
        groups: dict[int, list[float]] = {}
        for point, outcome in finished.items():
            if metric in outcome.final:
                groups.setdefault(point[index], []).append(outcome.final[metric])
        means = [sum(values) / len(values) for values in groups.values()]
        if len(means) > 1 and min(means) > 0:
            found[metric] = max(means) / min(means)
    return found
