"""Rows that several views show: environment, stages, intervals of limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from compress.results.formatting import format_bytes, format_interval, format_seconds, format_value, improvement
from compress.results.metrics import Metric, describe_metric
from compress.results.report import BASELINE, Cell, LimitResult, Report, StageRecord, StageTable


def environment_rows(environment: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested keys joined with dots, and their values as text."""
    for key, value in environment.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from environment_rows(value, f"{name}.")
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(str, value))
        else:
            yield name, _written(name, value)


def _written(name: str, value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and name.endswith("_bytes"):
        return format_bytes(value)
    return "" if value is None else str(value)


def limit_state(limit: LimitResult) -> str:
    """`passed`, `missed`, `unknown` or `skipped`."""
    return "skipped" if limit.skipped else "passed" if limit.passed else "unknown" if limit.unknown else "missed"


def limit_found(report: Report, limit: LimitResult) -> str:
    """What was found, as a person compares it with the bound: `99.54% of baseline (86.9%)`."""
    metric = describe_metric(limit.metric, report.metrics(limit.target).get(limit.metric, ""))
    value = format_value(metric, limit.value) if limit.value is not None else ""
    if limit.ratio is not None:
        found = f"{limit.ratio * 100:.2f}% of {limit.of} ({value})"
    else:
        known = format_interval(metric, limit.low, limit.high)
        found = f"{value} ({known})" if known else value
    # Why a target is not to be had is said once, of the target.
    gone = limit.skipped and any(skip.target == limit.target for skip in report.skipped)
    return "; ".join(filter(None, (found, _chance(limit), "target skipped" if gone else limit.reason)))


def _chance(limit: LimitResult) -> str:
    """`7 of 2,000 rows, within chance (99.4-99.8%)` of a missed limit on quality."""
    if limit.within_chance is None:
        return ""
    lost = f"{limit.rows_lost:,} of " if limit.rows_lost is not None else ""
    known = ""
    if limit.ratio_low is not None and limit.ratio_high is not None:
        known = f" ({limit.ratio_low * 100:.1f}\u2013{limit.ratio_high * 100:.1f}%)"
    return f"{lost}{limit.rows or 0:,} rows, {'within' if limit.within_chance else 'beyond'} chance{known}"


def limit_bound(limit: LimitResult) -> str:
    """The bound as text, with the processor that it is for."""
    return signs(limit.limit) + (f" ({limit.processor})" if limit.processor else "")


def signs(limit: str) -> str:
    """`>=` and `<=` as one character each."""
    return limit.replace(">=", "\u2265").replace("<=", "\u2264")


def notes_of(report: Report) -> list[str]:
    """What a reader must know before the figures: notes, skipped targets, failed checks."""
    lines = [*report.notes, *(f"Target {skip.target} was skipped: {skip.reason}" for skip in report.skipped)]
    return lines + [f"{check.stage}: {check.check}: {check.found}" for check in report.integrity if not check.passed]


def licence_rows(report: Report) -> list[tuple[str, str]]:
    """Each source and runtime with its licence, and who says so."""
    said = [(one, f" ({one.stated_in})" if one.stated_in else "") for one in report.licences]
    return [(f"{one.of} {one.name}" if one.of == "model" else one.of, one.licence + by) for one, by in said]


def models_of(report: Report, target: str, metrics: Sequence[Metric]) -> list[str]:
    """The models of which one of the metrics was measured there."""
    return [model for model in report.models if any(report.find(model, metric.name, target) for metric in metrics)]


def gain(report: Report, model: str, metric: Metric, target: str) -> str:
    """`17.8x smaller` than the baseline's value, `99.5% of baseline`; nothing where there is nothing to compare."""
    row, before = report.find(model, metric.name, target), report.find(BASELINE, metric.name, target)
    if row is None or before is None or model == BASELINE:
        return ""
    found = improvement(metric, row.value, before.value)
    return f"{found} of baseline" if found and metric.style == "percent" else found


def stage_cells(stage: StageRecord) -> tuple[str, str, str, str]:
    """Time, that of the checks, whether cached, peak memory."""
    peak = format_bytes(stage.peak_rss_bytes) if stage.peak_rss_bytes is not None else ""
    checks = format_seconds(stage.check_seconds) if stage.check_seconds else ""
    return format_seconds(stage.seconds), checks, "cached" if stage.cached else "ran", peak


def limit_cells(report: Report) -> list[tuple[str, ...]]:
    """Each limit: metric, target, bound, what was found, verdict."""
    return [
        (limit.metric, limit.target, limit_bound(limit), limit_found(report, limit), limit_state(limit))
        for limit in report.limits
    ]


def stage_remarks(report: Report) -> list[str]:
    """What stages found or chose, each line beginning with a stage's label."""
    return [
        remark if remark.startswith(f"{stage.name}:") else f"{stage.name}: {remark}"
        for stage in report.stages
        for remark in stage.remarks
    ]


def stage_tables(report: Report) -> list[tuple[str, StageTable]]:
    """What stages found in rows, each with a heading that begins with the stage's label."""
    return [(f"{stage.name}: {table.title}", table) for stage in report.stages for table in stage.tables]


def words_of(table: StageTable) -> tuple[int, ...]:
    """The columns that hold words, which are set flush left."""
    return tuple(place for place, column in enumerate(zip(*table.rows, strict=True)) if isinstance(column[0], str))


def format_cell(value: Cell) -> str:
    """A word as it is, a count with its thousands apart, a measured number to three digits."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def _moment(started: str) -> str:
    """`2026-11-25 12:00 UTC`; what is no ISO 8601 time stays as it is."""
    try:
        moment = datetime.fromisoformat(started)
    except ValueError:
        return started
    return f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".rstrip()


def run_line(report: Report) -> str:
    """When it ran, how long it took, and on what kind of processor."""
    parts = [f"started {_moment(report.started)}"] if report.started else []
    parts += [f"took {format_seconds(report.seconds)}"] if report.seconds is not None else []
    kind = report.environment.get("processor_class")
    parts += [f"on {kind}"] if kind and parts else []
    return ", ".join(parts)
