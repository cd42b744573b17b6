"""`search.json`: everything that a search knows, of which its page and the console's table are views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import numpy as np

from compress.plugins.search.costs import Costs
from compress.plugins.search.engine import Engine
from compress.plugins.search.final_evaluation import Final
from compress.plugins.search.formatting import figure
from compress.plugins.search.goal import named
from compress.plugins.search.ledger import Entry
from compress.plugins.search.outcome import slack
from compress.plugins.search.parameter_importance import Importance, importance
from compress.plugins.search.space import Point, Space
from compress.report.limits import limit_text
from compress.results.metrics import describe_metric
from compress.utils.pydantic_models import Frozen

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
    why: str = ""
    """Why it was tried."""
    reason: str = ""
    """Why it went no further."""
    final: dict[str, float] = {}
    spread: dict[str, tuple[float, float]] = {}
    """95% intervals, of figures that have one."""
    rooms: tuple[Room, ...] = ()
    seconds: float
    stages: tuple[tuple[str, str, float, bool], ...] = ()
    model: str = ""


class KnobRecord(Frozen):
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
    knobs: tuple[KnobRecord, ...]
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
    final: Final | None = None
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


def record_of(
    space: Space, engine: Engine, costs: Costs, entries: Sequence[Entry], final: Final | None, started: datetime
) -> SearchRecord:
    """Everything so far."""
    search, base = space.search, space.base
    best, front = engine.known.best() if final is None else final.winner.point, engine.known.front()
    nearest = None if best is not None else next(iter(engine.known.nearest()), None)
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
            KnobRecord(
                name=knob.name,
                values=tuple(map(str, knob.values)),
                effects=_effects(space, engine, index),
                importance={
                    metric: share
                    for metric, found in matters.items()
                    if found.shares is not None and (share := found.shares[index]) is not None
                },
            )
            for index, knob in enumerate(space.knobs)
        ),
        size=space.size,
        refused=space.refused | {space.words(point): why for point, why in engine.candidates.refused.items()},
        trials=tuple(_trial(space, engine, entry, best, front) for entry in entries),
        errors={metric: tuple(errors) for metric, errors in costs.errors.items()},
        rough=costs.why_not(),
        ended=engine.ended,
        best=None if best is None else space.words(best),
        unsure=None if best is None or best in engine.known.kept else _shortfall(space, engine, best),
        nearest=None if nearest is None else _shortfall(space, engine, nearest),
        final=final,
        bounds=_bounds(engine),
        left=None if engine.candidates.left is None else round(engine.candidates.left * space.size),
        past=dict(Counter(one.source for one in engine.candidates.past)),
        explained={metric: found.note for metric, found in matters.items()},
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
        why=entry.why,
        final=outcome.final,
        spread=outcome.spread,
        rooms=tuple(
            Room(limit=limit, value=room.value, low=room.low, high=room.high)
            for limit, room in engine.known.rooms.get((point, entry.rung), {}).items()
            if room is not None
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
    return "kept" if entry.point in engine.known.kept else "missed"


def _shortfall(space: Space, engine: Engine, point: Point) -> str:
    """Of the nearest recipe: every limit that it misses, what it has and what it would need."""
    outcome, parts = engine.known.finished[point], []
    for limit in engine.goal.limits:
        room = slack(limit, outcome, engine.goal.confidence)
        if room is None:
            parts.append(f"{named(limit)} was not measured")
        elif room.low < -1e-12:
            base = 1.0 if limit.of is None else outcome.baseline[limit.metric]
            has, needs = (figure(limit.metric, value) for value in (outcome.final[limit.metric], limit.bound * base))
            surely = "" if room.low == room.value else f", {-room.low:.2%} as surely as is wanted"
            most = "more" if limit.at_least is not None else "less"
            parts.append(f"{limit.metric} is {has} and needs {needs} or {most} ({-room.value:.2%} short{surely})")
    return f"{space.words(point)}: {'; '.join(parts)}"


def _effects(space: Space, engine: Engine, index: int) -> dict[str, float]:
    """Metric -> the largest mean of it over the smallest, of the recipes of each value."""
    found = {}
    finished = engine.known.finished
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


def _importance(space: Space, engine: Engine) -> dict[str, Importance]:
    """Of every figure; of sizes and times their logarithms, since choices multiply them."""
    found = {}
    for metric in _metrics(engine):
        known = {point: one.final[metric] for point, one in engine.known.finished.items() if metric in one.final}
        values = np.array(list(known.values()))
        multiplied = not describe_metric(metric).quality and bool((values > 0).all())
        found[metric] = importance(space.knobs, list(known), np.log(values) if multiplied else values)
    return found


def _bounds(engine: Engine) -> dict[str, float]:
    """The most that each figure may be; a limit of the baseline's is one once that is measured."""
    first = next(iter(engine.known.finished.values()), None)
    found: dict[str, float] = {}
    for limit in engine.goal.limits:
        base = 1.0 if limit.of is None else None if first is None else first.baseline.get(limit.metric)
        if limit.at_most is not None and base is not None:
            found[limit.metric] = min(limit.bound * base, found.get(limit.metric, float("inf")))
    return found


def foretold_lines(record: SearchRecord) -> list[str]:
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
