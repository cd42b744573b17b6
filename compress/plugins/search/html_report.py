"""HTML page of a search: Pareto front, trials, importance of parameters, and shared stages."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

from compress.plugins.search.record import (
    SearchRecord,
    TrialRecord,
    format_limits,
    format_margin,
    format_metric,
    prediction_error_lines,
)
from compress.report.pages import render
from compress.report.plot import Frame, Plot, element, scale_around
from compress.results.formatting import format_value
from compress.results.metrics import describe_metric


def search_page(record: SearchRecord) -> str:
    """Return the page, which refers to nothing outside and contains the record."""
    stages = stage_tree(record)
    return render(
        "plugins/search/templates/search.html",
        f"search of {record.name}",
        record.model_dump_json(),
        record=record,
        state=_state(record),
        chart=pareto_chart(record),
        states={"best": "passed", "front": "passed", "kept": "passed", "missed": "missed", "failed": "missed"},
        format_metric=format_metric,
        format_margin=format_margin,
        format_limits=format_limits,
        tree=stages,
        saved=sum(stage.saved for stage in stages),
        ran=sum(stage.seconds for stage in stages),
        metrics=[describe_metric(name) for name in record.minimize],
        knobs=_parameters(record),
        explained=[f"{describe_metric(metric).title}: {note}" for metric, note in record.explained.items()],
        errors=prediction_error_lines(record),
    )


@dataclass(frozen=True)
class StageNode:
    """Stage in the tree of stages: trials that used it, its seconds, and the seconds that sharing saved."""

    depth: int
    label: str
    trials: int
    seconds: float
    saved: float
    numbers: str


def stage_tree(record: SearchRecord) -> list[StageNode]:
    """Return every stage once, below the stages that it follows.

    A stage that was cached before the search took no time.
    """
    nodes, took = defaultdict[tuple[str, ...], list[int]](list), defaultdict[tuple[str, ...], list[float]](list)
    labels: dict[tuple[str, ...], str] = {}
    for trial in record.trials:
        path: tuple[str, ...] = ()
        for label, key, seconds, cached in trial.stages:
            # A stage is identified by its whole path, since its key covers the stages before it.
            path = (*path, key)
            nodes[path].append(trial.number)
            labels[path] = label
            if not cached:
                took[path].append(seconds)
    shown = []

    def order(path: tuple[str, ...]) -> list[tuple[int, str]]:
        """Return the first trial and the key of every stage of a path, so that branches stay together."""
        return [(nodes[path[:end]][0], path[end - 1]) for end in range(1, len(path) + 1)]

    for path in sorted(nodes, key=order):
        numbers, run_seconds = sorted(set(nodes[path])), took[path]
        saved = (len(nodes[path]) - len(run_seconds)) * sum(run_seconds) / len(run_seconds) if run_seconds else 0.0
        numbers_text = ", ".join(map(str, numbers[:12])) + (" ..." if len(numbers) > 12 else "")
        shown.append(StageNode(len(path) - 1, labels[path], len(numbers), sum(run_seconds), saved, numbers_text))
    return shown


@dataclass(frozen=True)
class _Choice:
    """Parameter with its values, and for each metric a bar with its importance and effect."""

    name: str
    values: str
    bars: list[tuple[str, float | None, str]]


def _parameters(record: SearchRecord) -> list[_Choice]:
    rows = []
    for parameter in record.knobs:
        row = _Choice(parameter.name, ", ".join(parameter.values), [])
        for metric in record.explained or parameter.effects:
            share, ratio = parameter.importance.get(metric), parameter.effects.get(metric)
            words = [] if share is None else [f"{share:.0%} of the variance"]
            words += [] if ratio is None else [f"means up to {ratio:.3g} times as large"]
            if words:
                row.bars.append((describe_metric(metric).title, share, ", ".join(words)))
        rows.append(row)
    return sorted(rows, key=lambda row: (-max([share or 0.0 for _, share, _ in row.bars], default=0.0), row.name))


def _state(record: SearchRecord) -> tuple[str, str]:
    if record.final is not None:
        return ("passed", "found") if record.final.winner.meets_limits else ("missed", "the winner misses a limit")
    if record.best is not None:
        return "unknown", "found, but not evaluated yet" if record.ended else "running, found one"
    return ("missed", "no recipe meets every limit") if record.ended else ("unknown", "running")


_FRAME = Frame(720.0, 400.0, 64.0, 704.0, 34.0, 346.0)
_KINDS = {"best": "final", "front": "front", "kept": "step", "missed": "missed"}
_LAST = {"best": 2, "front": 1}
"""Drawing order of the statuses that are drawn over the others."""
Ends = tuple[float, float]


@dataclass(frozen=True)
class _Spot:
    """Position of a trial, with the ends of its intervals where they exist."""

    trial: TrialRecord
    x: float
    y: float
    across: Ends | None
    up: Ends | None


def pareto_chart(record: SearchRecord) -> str:
    """Return the chart as SVG with infeasible regions tinted; empty with fewer than two trials."""
    spots = [spot for trial in record.trials if (spot := _spot(trial, record)) is not None]
    if len(spots) < 2:
        return ""
    second = len(record.minimize) > 1
    first, limits = describe_metric(record.minimize[0]), [record.bounds.get(name) for name in record.minimize]
    xs = [end for spot in spots for end in (spot.across or (spot.x, spot.x))]
    ys = [end for spot in spots for end in (spot.up or (spot.y, spot.y))]
    # Include a bound in the axis if it is near the values.
    x = scale_around([*xs, *_near(limits[0], xs)], _FRAME.left, _FRAME.right, min(xs) > 0, 0.06)
    y = scale_around([*ys, *(_near(limits[1], ys) if second else [0.0])], _FRAME.bottom, _FRAME.top, margin=0.1)
    plot = Plot(_FRAME, x, y)
    # Tint the area right of the first bound. Of two metrics also the area above the second bound, else that below 0.
    across, level = limits[0], limits[1] if second else 0.0
    areas = []
    if across is not None and across < x.high:
        areas.append((x(across), _FRAME.top, _FRAME.right, _FRAME.bottom))
    if level is not None and (level < y.high or not second):
        top, bottom = (_FRAME.top, y(level)) if second else (y(level), _FRAME.bottom)
        areas.append((_FRAME.left, top, _FRAME.right, bottom))
    for left, top, right, bottom in areas:
        plot.add(element("rect", {"x": left, "y": top, "width": max(right - left, 0.0),
                                  "height": max(bottom - top, 0.0), "class": "infeasible"}))  # fmt: skip
    plot.x_axis(f"{first.title}, smaller is better", lambda value: format_value(first, value))
    other = describe_metric(record.minimize[1]) if second else None
    if other is not None:
        plot.y_axis(f"{other.title}, smaller is better", lambda value: format_value(other, value))
    else:
        plot.y_axis(f"Inside {_quality(record)}, as a share of its bound", lambda value: f"{value:+.1%}")
        plot.add(plot.straight((x.low, 0.0), (x.high, 0.0), "bound"))
    _draw(plot, spots, record)
    against = f"its {other.title.lower()}" if other is not None else "how well it keeps its limits"
    return plot.svg(f"{first.title} of every trial against {against}")


def _draw(plot: Plot, spots: list[_Spot], record: SearchRecord) -> None:
    front = sorted((spot.x, spot.y) for spot in spots if spot.trial.status in _LAST and spot.trial.share == 1)
    if len(front) > 1:
        # Draw steps: a recipe beats all that are worse in both metrics, and nothing is known between two of them.
        steps = [step for (_, y), corner in pairwise(front) for step in ((corner[0], y), corner)]
        plot.add(plot.line([front[0], *steps], "front"))
    # Draw the best recipes last, over the others.
    for spot in sorted(spots, key=lambda spot: _LAST.get(spot.trial.status, 0)):
        trial = spot.trial
        kind = "early" if trial.share < 1 else _KINDS.get(trial.status, "step")
        if trial.share == 1 and not any(trial.point) and trial.status != "best":
            kind = "baseline"
        size = 5.5 if trial.share == 1 else 3.5
        share = "" if trial.share == 1 else f", {trial.share:.0%} of its training"
        values = ((describe_metric(name).title, format_metric(name, trial.final.get(name))) for name in record.minimize)
        lines = [
            f"trial {trial.number}{share}: {trial.words}",
            *(f"{title}: {value}" for title, value in values),
            *(format_margin(room.limit, room.value, room.low) for room in trial.rooms),
            *([f"tried because: {trial.why}"] if trial.why else []),
            trial.status + (f": {trial.reason}" if trial.reason else ""),
        ]
        plot.add(plot.mark(kind, (spot.x, spot.y), "\n".join(lines), size, spot.across, spot.up))
    plot.labels([((spot.x, spot.y), f"{spot.trial.number}", "label") for spot in spots if spot.trial.status in _LAST])


def _near(bound: float | None, values: list[float]) -> list[float]:
    """Return a bound if it is near enough to the values to be shown on the axis."""
    return [] if bound is None or not min(values) / 2 < bound < 2 * max(values) else [bound]


def _spot(trial: TrialRecord, record: SearchRecord) -> _Spot | None:
    name, *others = record.minimize
    if others:
        second, up = trial.final.get(others[0]), trial.spread.get(others[0])
    else:
        rooms = {room.limit: (room.value, (room.low, room.high)) for room in trial.rooms}
        second, up = rooms.get(_quality(record), (None, None))
    first = trial.final.get(name)
    return None if first is None or second is None else _Spot(trial, first, second, trial.spread.get(name), up)


def _quality(record: SearchRecord) -> str:
    """Return the limit that the chart shows: the first on quality, or else the first."""
    names = [room.limit for trial in record.trials for room in trial.rooms]
    good = [name for name in names if describe_metric(name.split()[0]).quality]
    return (good or names or [""])[0]
