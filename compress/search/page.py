"""A search as a page: the front with its intervals, every trial, what each choice moved, what was shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from compress.charts.plot import Frame, Plot, element, scale_around
from compress.fitted_table import Column, FittedTable
from compress.metrics import describe_metric, format_seconds, format_value
from compress.report.pages import render
from compress.search.finish import Judged
from compress.search.record import Room, SearchRecord, TrialRecord

_FRAME = Frame(960.0, 420.0, 64.0, 940.0, 34.0, 366.0)
_KINDS = {"best": "final", "front": "front", "kept": "step", "missed": "missed"}


def search_page(record: SearchRecord) -> str:
    """The page; it refers to nothing outside and keeps the record."""
    return render(
        "search/templates/search.html",
        f"search of {record.name}",
        record.model_dump_json(),
        record=record,
        state=_state(record),
        chart=front_chart(record),
        trials=[_row(trial, record) for trial in record.trials],
        tree=tree(record),
        metrics=[describe_metric(name) for name in record.minimize],
        knobs=_knobs(record),
        judged=[_judged(one, record) for one in record.final.judged] if record.final else [],
        seeds=_seeds(record),
        errors=_errors(record),
    )


def search_table(record: SearchRecord) -> RenderableType:
    """The models of the last session, or what was tried where there was none; then what was found."""
    parts: list[RenderableType] = []
    if record.final is not None:
        names = [describe_metric(name) for name in record.minimize]
        columns = [Column("Model"), *(Column(one.title, right=True) for one in names), Column("Limits"),
                   Column("Differs in", rank=1)]  # fmt: skip
        table = FittedTable(f"{record.name}: the test rows, read once", columns)
        for one in record.final.judged:
            shown = _judged(one, record)
            table.add(one.name, *shown.figures, (shown.verdict, "green" if one.keeps else "bold red"), one.words)
        parts.append(table)
    for line in closing_lines(record):
        parts.append(Text(line, style="green" if line.startswith("✓") else ""))
    return Group(*parts)


def closing_lines(record: SearchRecord) -> list[str]:
    """What a person should know at the end."""
    lines = []
    if record.final is not None:
        for limit in record.final.winner.limits:
            mark = "✓" if limit.passed else "?" if not limit.missed else "✗"
            ratio = f", {limit.ratio:.2%} of {limit.of}" if limit.ratio is not None else ""
            value = "" if limit.value is None else format_value(describe_metric(limit.metric), limit.value)
            lines.append(
                f"{mark} {limit.metric} {limit.limit}: {value}{ratio}{f' ({limit.reason})' if limit.reason else ''}"
            )
    elif record.ended:
        lines.append("No recipe keeps every limit." + (f" Nearest: {record.nearest}." if record.nearest else ""))
    lines += _errors(record)
    lines.append(
        f"{len(record.trials)} trials in {format_seconds(record.seconds)}, {record.stages_run} stages run and "
        f"{record.stages_shared} shared; {record.ended or 'going on'}."
    )
    return lines


@dataclass(frozen=True)
class _Shown:
    """A model of the last session as the views write it."""

    name: str
    words: str
    figures: tuple[str, ...]
    verdict: str
    state: str
    lines: tuple[str, ...]


def _judged(one: Judged, record: SearchRecord) -> _Shown:
    missed = [limit for limit in one.limits if limit.missed]
    unknown = [limit for limit in one.limits if limit.unknown]
    verdict = f"{len(missed)} missed" if missed else f"{len(unknown)} can't tell" if unknown else "all kept"
    state = "missed" if missed else "unknown" if unknown else "passed"
    figures = tuple(
        format_value(describe_metric(name), one.final[name]) if name in one.final else "" for name in record.minimize
    )
    lines = tuple(
        f"{limit.metric} {limit.limit}: "
        + (
            f"{limit.ratio:.2%} of {limit.of}"
            if limit.ratio is not None and limit.of
            else _value(limit.metric, limit.value)
        )
        for limit in one.limits
    )
    return _Shown(one.name, one.words, figures, verdict, state, lines)


def _value(metric: str, value: float | None) -> str:
    return "not measured" if value is None else format_value(describe_metric(metric), value)


def front_chart(record: SearchRecord) -> str:
    """The first figure to minimize against the room to a limit of quality, or against the second figure."""
    points = [(trial, *place) for trial in record.trials if (place := _place(trial, record)) is not None]
    if len(points) < 2:
        return ""
    xs = [x for _, x, _, _ in points]
    ys = [end for _, _, y, room in points for end in ((y,) if room is None else (room.low, room.high))]
    second = len(record.minimize) > 1
    x = scale_around(xs, _FRAME.left, _FRAME.right, min(xs) > 0, 0.06)
    y = scale_around([*ys, *([] if second else [0.0])], _FRAME.bottom, _FRAME.top, margin=0.1)
    plot = Plot(_FRAME, x, y)
    first = describe_metric(record.minimize[0])
    if not second:
        floor = y(0.0)
        plot.add(
            element("rect", {"x": _FRAME.left, "y": floor, "width": _FRAME.right - _FRAME.left,
                             "height": max(_FRAME.bottom - floor, 0.0), "class": "infeasible"})
        )  # fmt: skip
    plot.x_axis(f"{first.title}, smaller is better", lambda value: format_value(first, value))
    if second:
        other = describe_metric(record.minimize[1])
        plot.y_axis(f"{other.title}, smaller is better", lambda value: format_value(other, value))
    else:
        plot.y_axis(f"Inside {_quality(record)}, as a share of its bound", lambda value: f"{value:+.1%}")
        plot.add(plot.straight((x.low, 0.0), (x.high, 0.0), "bound"))
    front = sorted((px, py) for trial, px, py, _ in points if trial.status in ("best", "front") and trial.share == 1)
    if len(front) > 1:
        plot.add(plot.line(front, "front"))
    order = {"best": 2, "front": 1}
    for trial, px, py, room in sorted(points, key=lambda point: order.get(point[0].status, 0)):
        kind = "early" if trial.share < 1 else "baseline" if not any(trial.point) and trial.status != "best" else (
            _KINDS.get(trial.status, "step")
        )  # fmt: skip
        up = None if room is None or second else (room.low, room.high)
        size = 5.5 if trial.share == 1 else 3.5
        plot.add(plot.mark(kind, (px, py), _tip(trial, record), size, up=up))
    named = [((px, py), f"{trial.number}", "label") for trial, px, py, _ in points if trial.status in ("best", "front")]
    plot.labels(named)
    return plot.svg(f"{first.title} of every trial against how well it keeps its limits")


def tree(record: SearchRecord) -> list[tuple[int, str, int, float, str]]:
    """Stages as a tree: depth, label, how many trials went through it, seconds, the numbers of the trials."""
    nodes: dict[tuple[str, ...], list[TrialRecord]] = {}
    cost: dict[tuple[str, ...], float] = {}
    labels: dict[tuple[str, ...], str] = {}
    for trial in record.trials:
        path: tuple[str, ...] = ()
        for label, key, seconds, cached in trial.stages:
            path = (*path, key)
            nodes.setdefault(path, []).append(trial)
            labels[path] = label
            cost[path] = cost.get(path, 0.0) + (0.0 if cached else seconds)
    shown = []
    for path in sorted(nodes, key=lambda one: [nodes[one[: i + 1]][0].number for i in range(len(one))] + [len(one)]):
        numbers = sorted({trial.number for trial in nodes[path]})
        told = ", ".join(map(str, numbers[:12])) + (" ..." if len(numbers) > 12 else "")
        shown.append((len(path) - 1, labels[path], len(numbers), cost[path], told))
    return shown


def _place(trial: TrialRecord, record: SearchRecord) -> tuple[float, float, Room | None] | None:
    first = trial.final.get(record.minimize[0])
    if first is None:
        return None
    if len(record.minimize) > 1:
        second = trial.final.get(record.minimize[1])
        return None if second is None else (first, second, None)
    rooms = [room for room in trial.rooms if room.limit == _quality(record)]
    return None if not rooms else (first, rooms[0].value, rooms[0])


def _quality(record: SearchRecord) -> str:
    """The limit that the chart shows: the first on quality that trials tell, or the first at all."""
    names = [room.limit for trial in record.trials for room in trial.rooms]
    good = [name for name in names if describe_metric(name.split()[0]).quality]
    return (good or names or [""])[0]


def _tip(trial: TrialRecord, record: SearchRecord) -> str:
    share = "" if trial.share == 1 else f", {trial.share:.0%} of its training"
    lines = [f"trial {trial.number}{share}: {trial.words}"]
    lines += [f"{describe_metric(name).title}: {_value(name, trial.final.get(name))}" for name in record.minimize]
    lines += [f"{room.limit}: {room.value:+.2%} inside ({room.low:+.2%} to {room.high:+.2%})" for room in trial.rooms]
    lines.append(trial.status + (f": {trial.reason}" if trial.reason else ""))
    return "\n".join(lines)


def _row(trial: TrialRecord, record: SearchRecord) -> dict[str, object]:
    states = {"best": "passed", "front": "passed", "kept": "passed", "missed": "missed", "failed": "missed"}
    return {
        "trial": trial,
        "figures": [_value(name, trial.final.get(name)) for name in record.minimize],
        "rooms": [f"{room.limit}: {room.value:+.2%} (surely {room.low:+.2%})" for room in trial.rooms],
        "state": states.get(trial.status, "unknown"),
        "share": "" if trial.share == 1 else f"{trial.share:.0%}",
        "shared": f"{sum(cached for *_, cached in trial.stages)} of {len(trial.stages)}",
    }


def _knobs(record: SearchRecord) -> list[tuple[str, str, list[str]]]:
    rows = []
    for knob in record.knobs:
        effects = [f"{describe_metric(name).title} x{ratio:.3g}" for name, ratio in knob.effects.items()]
        rows.append((knob.name, ", ".join(knob.values), effects))
    return sorted(rows, key=lambda row: row[0])


def _seeds(record: SearchRecord) -> list[tuple[int, list[str]]]:
    if record.final is None:
        return []
    return [
        (one.seed, [one.error] if one.error else [
            f"{limit.metric} {limit.limit}: "
            + (f"{limit.ratio:.2%}" if limit.ratio is not None else _value(limit.metric, limit.value))
            for limit in one.limits
        ])
        for one in record.final.seeds
    ]  # fmt: skip


def _errors(record: SearchRecord) -> list[str]:
    told = []
    for metric, errors in record.errors.items():
        sizes: Sequence[float] = sorted(map(abs, errors))
        if sizes:
            told.append(
                f"{describe_metric(metric).title} was foretold within {sizes[-1]:.2%}, {sizes[len(sizes) // 2]:.2%} in "
                f"the median, for {len(sizes)} recipes"
            )
    return told + [f"{describe_metric(metric).title}: {why}" for metric, why in record.rough.items()]


def _state(record: SearchRecord) -> tuple[str, str]:
    if record.final is None:
        return ("unknown", "going on") if not record.ended else ("missed", "nothing keeps every limit")
    return ("passed", "found") if record.final.winner.keeps else ("missed", "the winner misses a limit")
