"""HTML page of a search: Pareto front, trials, importance of parameters, and shared stages."""

from __future__ import annotations

from dataclasses import dataclass

from compress.plugins.search.formatting import format_limits, format_margin, format_metric, format_model
from compress.plugins.search.pareto_chart import pareto_chart
from compress.plugins.search.record import SearchRecord, TrialRecord, prediction_error_lines
from compress.report.pages import render
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
        trials=[_row(trial, record) for trial in record.trials],
        tree=stages,
        saved=sum(stage.saved for stage in stages),
        ran=sum(stage.seconds for stage in stages),
        metrics=[describe_metric(name) for name in record.minimize],
        knobs=_parameters(record),
        explained=_explained(record),
        judged=[format_model(model, record.minimize) for model in record.final.judged] if record.final else [],
        seeds=_seeds(record),
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
    """Return every stage once, below the stages that it follows. A stage that was cached before the search took
    no time.
    """
    nodes: dict[tuple[str, ...], list[int]] = {}
    took: dict[tuple[str, ...], list[float]] = {}
    labels: dict[tuple[str, ...], str] = {}
    for trial in record.trials:
        path: tuple[str, ...] = ()
        for label, key, seconds, cached in trial.stages:
            path = (*path, key)
            nodes.setdefault(path, []).append(trial.number)
            labels[path] = label
            if not cached:
                took.setdefault(path, []).append(seconds)
    shown = []
    for path in sorted(
        nodes,
        key=lambda node_path: [(nodes[node_path[:end]][0], node_path[end - 1]) for end in range(1, len(node_path) + 1)],
    ):
        numbers, run_seconds = sorted(set(nodes[path])), took.get(path, [])
        saved = (len(nodes[path]) - len(run_seconds)) * sum(run_seconds) / len(run_seconds) if run_seconds else 0.0
        numbers_text = ", ".join(map(str, numbers[:12])) + (" ..." if len(numbers) > 12 else "")
        shown.append(StageNode(len(path) - 1, labels[path], len(numbers), sum(run_seconds), saved, numbers_text))
    return shown


def _row(trial: TrialRecord, record: SearchRecord) -> dict[str, object]:
    states = {"best": "passed", "front": "passed", "kept": "passed", "missed": "missed", "failed": "missed"}
    return {
        "trial": trial,
        "figures": [format_metric(name, trial.final.get(name)) for name in record.minimize],
        "rooms": [format_margin(room.limit, room.value, room.low) for room in trial.rooms],
        "state": states.get(trial.status, "unknown"),
        "share": "" if trial.share == 1 else f"{trial.share:.0%} of its training",
        "shared": f"{sum(cached for *_, cached in trial.stages)} of {len(trial.stages)} stages shared",
    }


@dataclass(frozen=True)
class _Choice:
    """Parameter with its values, and for each metric a bar with its importance and effect."""

    name: str
    values: str
    bars: tuple[tuple[str, float | None, str], ...]


def _parameters(record: SearchRecord) -> list[_Choice]:
    rows = []
    for parameter in record.knobs:
        bars = []
        for metric in record.explained or parameter.effects:
            share, ratio = parameter.importance.get(metric), parameter.effects.get(metric)
            words = [] if share is None else [f"{share:.0%} of the variance"]
            words += [] if ratio is None else [f"means up to {ratio:.3g} times as large"]
            if words:
                bars.append((describe_metric(metric).title, share, ", ".join(words)))
        rows.append(_Choice(parameter.name, ", ".join(parameter.values), tuple(bars)))
    return sorted(rows, key=lambda row: (-max([share or 0.0 for _, share, _ in row.bars], default=0.0), row.name))


def _explained(record: SearchRecord) -> list[str]:
    return [f"{describe_metric(metric).title}: {note}" for metric, note in record.explained.items()]


def _seeds(record: SearchRecord) -> list[tuple[int, list[str]]]:
    if record.final is None:
        return []
    return [
        (seed_result.seed, [seed_result.error] if seed_result.error else list(format_limits(seed_result.limits)))
        for seed_result in record.final.seeds
    ]


def _state(record: SearchRecord) -> tuple[str, str]:
    if record.final is not None:
        return ("passed", "found") if record.final.winner.meets_limits else ("missed", "the winner misses a limit")
    if record.best is not None:
        return "unknown", "found, and not judged yet" if record.ended else "going on, found one"
    return ("missed", "nothing keeps every limit") if record.ended else ("unknown", "going on")
