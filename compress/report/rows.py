"""Text of rows that several views show: environment, limits, stages."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from compress.formats.targets import TARGETS
from compress.report.limits import unusable_machine
from compress.results.formatting import format_bytes, format_improvement, format_interval, format_seconds, format_value
from compress.results.metrics import Metric, describe_metric
from compress.results.report import (
    BASELINE,
    FINAL,
    Cell,
    LayerBytes,
    LimitResult,
    Measurement,
    Report,
    StageRecord,
    StageTable,
)
from compress.tasks.registry import TASKS


def environment_rows(environment: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested keys joined with dots, and their values as text."""
    for key, value in environment.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from environment_rows(value, f"{name}.")
        elif isinstance(value, list | tuple):
            yield name, ", ".join(map(str, value))
        else:
            # Booleans are integers in Python, and no sizes.
            is_size = isinstance(value, int) and not isinstance(value, bool) and name.endswith("_bytes")
            yield name, format_bytes(value) if is_size else "" if value is None else str(value)


def limit_state(limit: LimitResult) -> str:
    """Return `passed`, `missed`, `unknown` or `skipped`."""
    return "skipped" if limit.skipped else "passed" if limit.passed else "unknown" if limit.unknown else "missed"


LIMIT_WORDS = {"passed": "kept", "missed": "missed", "unknown": "inconclusive", "skipped": "not judged", "none": ""}
"""States of `limit_state` as readers see them."""


def limit_result(report: Report, limit: LimitResult) -> str:
    """Return the measured value as a reader compares it with the bound: `99.54% of baseline (86.9%)`."""
    metric = describe_metric(limit.metric, report.metrics(limit.target).get(limit.metric, ""))
    value = format_value(metric, limit.value) if limit.value is not None else ""
    if limit.ratio is not None:
        text = f"{limit.ratio * 100:.2f}% of {limit.of} ({value})"
    else:
        interval = format_interval(metric, limit.low, limit.high)
        text = f"{value} ({interval})" if interval else value
    evidence = ""
    if limit.within_chance is not None:  # a limit on quality that is not kept: `7 fewer right of 2,000 rows`
        compared = "fewer" if limit.of else "too few"
        lost = (
            f"{limit.rows_lost:,} {compared} right of " if limit.rows_lost is not None and limit.rows_lost > 0 else ""
        )
        # Older reports have missed limits that chance could explain.
        chance = "" if limit.verdict == "cannot tell" else f", {'within' if limit.within_chance else 'beyond'} chance"
        evidence = f"{lost}{limit.rows or 0:,} rows{chance}"
        if limit.ratio_low is not None and limit.ratio_high is not None:
            evidence += f" ({limit.ratio_low * 100:.1f}\u2013{limit.ratio_high * 100:.1f}%)"
    # The reason is stated once, with the target.
    target_skipped = limit.skipped and any(skip.target == limit.target for skip in report.skipped)
    return "; ".join(filter(None, (text, evidence, "target skipped" if target_skipped else limit.reason)))


def limit_bound(limit: LimitResult) -> str:
    """Return the bound as text, with the processor that it applies to."""
    return comparison_signs(limit.limit) + (f" ({limit.processor})" if limit.processor else "")


def comparison_signs(limit: str) -> str:
    """Return the text with `>=` and `<=` as one character each."""
    return limit.replace(">=", "\u2265").replace("<=", "\u2264")


_WARNING = re.compile(
    r"^data: (?!.* rows?; .* repeats? another)|noise: (noisy|unusable)|above the target|no interval yet|not stable"
    r"|no VNNI|larger than|hardly smaller|contradict|[Nn]o licence"
)
"""Words of notes that make a number or the model questionable. Other notes say how something was measured."""


def has_app(report: Report) -> bool:
    """Return whether `compress bundle` takes the model. It does unless the task is known to have no app."""
    task = TASKS.get(report.task)
    return task is None or task.app_steps is not None


def notes_by_severity(report: Report) -> dict[str, list[str]]:
    """Return failed checks, warnings and notes under their headings, the most severe first."""
    skips = [(skip.failed, f"Target {skip.target} was skipped: {skip.reason}") for skip in report.skipped]
    failed = [f"{check.stage}: {check.check}: {check.found}" for check in report.integrity if not check.passed]
    warnings = [note for note in report.notes if _WARNING.search(note)]
    return {
        "Failed": failed + [line for is_failure, line in skips if is_failure],
        "Warnings": warnings + [line for is_failure, line in skips if not is_failure],
        "Notes": [*(note for note in report.notes if note not in warnings), *speedup_notes(report)],
    }


def target_lines(report: Report) -> list[str]:
    """Return one line for each target with headlines: its runtime, and the size of the batches that are timed."""
    lines = []
    for target in report.headed:
        profile = TARGETS.get(target)
        timed = "; batch 1: one example per call, as for one user" if report.find(FINAL, "latency_ms", target) else ""
        lines += [f"{target}: {profile.description}{timed}"] if profile and profile.description else []
    return lines


def licence_rows(report: Report) -> list[tuple[str, str]]:
    """Return each source and runtime with its licence, and the file that states it."""
    sources = [(licence, f" ({licence.stated_in})" if licence.stated_in else "") for licence in report.licences]
    return [
        (f"{licence.of} {licence.name}" if licence.of == "model" else licence.of, licence.licence + source)
        for licence, source in sources
    ]


def models_of(report: Report, target: str, metrics: Sequence[Metric]) -> dict[str, str]:
    """Return the models for which one of the metrics was measured on the target, with the names that tables show.

    The last stage usually gives the final model. Its row is then left out, and `final (onnx_int8)` names it.
    """
    models = [model for model in report.models if any(report.find(model, metric.name, target) for metric in metrics)]
    names = {model: model for model in models}
    # Times and memory of one file differ between two measurements, unlike its size and its answers.
    fixed = [metric.name for metric in metrics if metric.from_file or metric.quality]
    values = {
        model: [row and row.value for row in (report.find(model, name, target) for name in fixed)]
        for model in models[-2:]
    }
    if models[-1:] == [FINAL] and len(models) > 1 and models[-2] != BASELINE and values[models[-2]] == values[FINAL]:
        names[FINAL] = f"{FINAL} ({models[-2]})"
        del names[models[-2]]
    return names


def improvement_text(report: Report, model: str, metric: Metric, target: str) -> str:
    """Return `17.8x smaller`, `~2x faster` or `99.5%`, or nothing without a comparison.

    Args:
        report: Report of the run.
        model: Name of the model.
        metric: Metric that is compared.
        target: Target of the measurements.
    """
    row, baseline = report.find(model, metric.name, target), report.find(BASELINE, metric.name, target)
    if row is None or baseline is None or model == BASELINE:
        return ""
    text = format_improvement(metric, row.value, baseline.value)
    return approximate_mark(report, row) + text if text else ""


def improvement_cell(report: Report, model: str, metric: Metric, target: str) -> str:
    """Return `improvement_text`, for a share with the words `of baseline`."""
    text = improvement_text(report, model, metric, target)
    return f"{text} of baseline" if text and metric.style == "percent" else text


def stage_cells(stage: StageRecord) -> tuple[str, str, str, str]:
    """Return time, time of the checks, whether cached, and peak memory."""
    peak = format_bytes(stage.peak_rss_bytes) if stage.peak_rss_bytes is not None else ""
    checks = format_seconds(stage.check_seconds) if stage.check_seconds else ""
    return format_seconds(stage.seconds), checks, "cached" if stage.cached else "ran", peak


def approximate_mark(report: Report, row: Measurement) -> str:
    """Return `~` for a time that was measured on a machine too noisy for times, or nothing."""
    metric = describe_metric(row.metric, row.unit)
    is_exact = metric.relative and row.model == BASELINE
    return "~" if metric.timed and not is_exact and unusable_machine(report.environment) else ""


def speedup_notes(report: Report) -> tuple[str, ...]:
    """Return for each target why its speed-up differs from the quotient of the latencies, if it does notably."""
    notes = []
    for target in report.headed:
        before, now = (report.find(model, "latency_ms", target) for model in (BASELINE, FINAL))
        speedup = report.find(FINAL, "speedup", target)
        if not (before and now and speedup) or min(before.value, now.value, speedup.value) <= 0:
            continue
        quotient = before.value / now.value
        if abs(speedup.value / quotient - 1) > NOTABLE_DIFFERENCE:
            notes.append(
                f"{target}: the speed-up is the mean ratio of calls timed in turns, which cancels slow phases of the "
                f"machine; the quotient of the two median latencies is {quotient:.3g}x"
            )
    return tuple(notes)


def limit_cells(report: Report) -> list[tuple[str, ...]]:
    """Return metric, target, bound, result and verdict of each limit."""
    return [
        (limit.metric, limit.target, limit_bound(limit), limit_result(report, limit), LIMIT_WORDS[limit_state(limit)])
        for limit in report.limits
    ]


def stage_remarks(report: Report) -> list[str]:
    """Return the notes of stages, each line beginning with a stage's label."""
    return [
        remark if remark.startswith(f"{stage.name}:") else f"{stage.name}: {remark}"
        for stage in report.stages
        for remark in stage.remarks
    ]


def stage_tables(report: Report) -> list[tuple[str, StageTable]]:
    """Return the tables of stages, each with a heading that begins with the stage's label."""
    return [(f"{stage.name}: {table.title}", table) for stage in report.stages for table in stage.tables]


def text_columns(table: StageTable) -> tuple[int, ...]:
    """Return the columns that hold text, which are aligned left."""
    return tuple(index for index, column in enumerate(zip(*table.rows, strict=True)) if isinstance(column[0], str))


def format_cell(value: Cell) -> str:
    """Return text unchanged, a count with thousands separators, and a measured number with three digits."""
    if isinstance(value, str):
        return value
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


def run_line(report: Report) -> str:
    """Return start (`2026-11-25 12:00 UTC`), duration and kind of processor of a run."""
    started = report.started
    with suppress(ValueError):  # text that is no ISO 8601 time stays as it is
        moment = datetime.fromisoformat(started or "")
        started = f"{moment:%Y-%m-%d %H:%M} {moment.tzname() or ''}".rstrip()
    parts = [f"started {started}"] if started else []
    parts += [f"took {format_seconds(report.seconds)}"] if report.seconds is not None else []
    kind = report.environment.get("processor_class")
    parts += [f"on {kind}"] if kind and parts else []
    return ", ".join(parts)


NOTABLE_DIFFERENCE = 0.1
"""Relative difference of a ratio of times and the quotient of the times from which views explain it."""
UNNAMED = "(no module in the name)"
_SEPARATORS = re.compile(r"[./]+")
_GENERATED = re.compile(r"^(onnx::.*|val_\d+.*|_val_\d+.*|\d+|[a-z]*const(ant)?_?\d*.*)$", re.IGNORECASE)


@dataclass(frozen=True)
class ModuleBytes:
    """Model -> module -> bytes by dtype, and all modules, the largest first."""

    groups: dict[str, dict[str, dict[str, int]]]
    modules: list[str]

    @property
    def models(self) -> dict[str, int]:
        """Return the total bytes of each model."""
        return {
            model: sum(sum(dtypes.values()) for dtypes in modules.values()) for model, modules in self.groups.items()
        }


def module_of(name: str) -> str:
    """Return the module of a tensor: `bert.encoder.layer.3.attention.self.query.weight` -> `bert.encoder.layer.3`.

    It is the path up to its first number, or else its first two parts without the tensor's own name.
    """
    parts = [part for part in _SEPARATORS.split(name) if part]
    if not parts or _GENERATED.match(name.strip("/")):
        return UNNAMED
    # Numbered blocks are the unit in which people think about a transformer.
    for index, part in enumerate(parts[:-1]):
        if part.isdigit() and index > 0:
            return ".".join(parts[: index + 1])
    return ".".join(parts[:-1][:2]) or UNNAMED


def group_by_module(layers: Iterable[LayerBytes]) -> dict[str, dict[str, int]]:
    """Return module -> bytes by dtype, the largest first, with modules in the order of first appearance."""
    modules: dict[str, Counter[str]] = {}
    for layer in layers:
        # A counter sums tensors of one dtype.
        modules.setdefault(module_of(layer.name), Counter())[layer.dtype] += layer.bytes
    return {name: dict(dtypes.most_common()) for name, dtypes in modules.items()}


def largest(layers: Iterable[LayerBytes], count: int = 12) -> list[LayerBytes]:
    """Return the tensors with the most bytes."""
    return sorted(layers, key=lambda layer: -layer.bytes)[:count]


def module_bytes(report: Report) -> ModuleBytes:
    """Return the stored bytes of the baseline and the final model, or else of the first two models."""
    available = [model for model, layers in report.bytes_by_layer.items() if layers]
    # Two models fit side by side.
    shown = [model for model in (BASELINE, FINAL) if model in available] or available[:2]
    groups = {model: group_by_module(report.bytes_by_layer[model]) for model in shown}
    sizes: dict[str, int] = {}
    for modules in groups.values():
        for module, dtypes in modules.items():
            sizes[module] = max(sizes.get(module, 0), sum(dtypes.values()))
    return ModuleBytes(groups, sorted(sizes, key=lambda module: -sizes[module]))
