"""Plan of a run: frozen models that are the JSON of `compress check --json`, and their tables for a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from rich.console import Group, RenderableType
from rich.text import Text

from compress.data.dataset import TEST
from compress.formats.target_profile import PROCESSORS
from compress.recipe.recipe import Limit
from compress.report.notebook import terminal_text, terminal_view
from compress.results.formatting import format_bytes
from compress.results.report import LicenceRecord
from compress.stages.cost_model import Estimate
from compress.utils.pydantic_models import Frozen
from compress.utils.responsive_table import ResponsiveTable, TableColumn

_UNITS = (("s", 1, 90), ("min", 60, 5400), ("h", 3600, float("inf")))
"""Units of time, their seconds, and the seconds below which each is used."""
_CERTAIN, _SHORT_SECONDS = 2.0, 10.0
"""One number is shown if the ratio of high to low is below the first, or the time below the second constant."""


class StagePlan(Frozen):
    """Plan of one stage. ``cached`` is None if unknown. A cached stage costs nothing."""

    label: str
    kind: str
    takes: str = Field(description="class of the input model")
    gives: str = Field(description="class of the output model")
    reads: tuple[str, ...] = Field(description="data that the stage reads: splits and other text")
    refers_to: tuple[str, ...] = Field(description="earlier stages whose outputs it reads besides its input")
    cached: bool | None
    seconds: Estimate
    peak_memory_bytes: Estimate
    disk_bytes: Estimate


class SourcePlan(Frozen):
    """Starting model, split or unlabeled text."""

    role: str
    reference: str
    status: Literal["here", "unknown until fetched"]
    path: str | None
    size_bytes: int | None = None
    parameters: int | None = None
    rows: int | None = Field(None, description="rows of data that was read")
    note: str = ""


class TargetPlan(Frozen):
    """Availability of a target, or the reason why it will be skipped."""

    name: str
    available: bool
    reason: str


class Plan(Frozen):
    """Everything known about a run before a model is loaded."""

    recipe: str
    task: str
    task_is_inferred: bool = Field(False, description="whether the task was inferred from the model's config")
    sources: tuple[SourcePlan, ...]
    data: tuple[str, ...] = Field((), description="rows, classes and repeated rows of labeled data")
    data_warnings: tuple[str, ...] = Field((), description="reasons why no model can be judged by this data")
    stages: tuple[StagePlan, ...]
    targets: tuple[TargetPlan, ...]
    stand_in: str | None = Field(
        None, description="target that measures the model if none of the recipe's targets is available"
    )
    processor: str = Field(description="processor class of this machine")
    decided: dict[str, str] = Field(
        {}, description="maps a stage's label to its choices that depend on the target processors"
    )
    limits: tuple[Limit, ...]
    limit_warnings: tuple[str, ...] = Field((), description="limits that so few test rows will probably not decide")
    size_warnings: tuple[str, ...] = Field((), description="a final model that is larger than the given model")
    measuring: Estimate = Field(description="seconds for the evaluation and timing of all models")
    seconds: Estimate
    disk_needed_bytes: Estimate
    disk_free_bytes: int
    artifacts: str
    licences: tuple[LicenceRecord, ...] = Field(
        (), description="licences of sources and runtimes that are available locally"
    )
    licence_remarks: tuple[str, ...] = Field((), description="obligations of these licences for redistribution")
    plugins: tuple[str, ...] = Field((), description="plug-ins of other packages that cannot be used, with reasons")

    def _repr_html_(self) -> str:
        """Return the tables of the terminal for notebooks."""
        return terminal_view(render_plan(self))

    def __str__(self) -> str:
        return terminal_text(render_plan(self))

    def __repr__(self) -> str:
        stages = [stage.label for stage in self.stages]
        return f"Plan(recipe={self.recipe!r}, task={self.task!r}, stages={stages}, seconds={self.seconds.value!r})"


def render_plan(plan: Plan, details: bool = False) -> RenderableType:
    """Return tables of sources, stages, targets, limits and totals, with ``details`` also how each was estimated."""
    processor = PROCESSORS.get(plan.processor)
    summation = "8-bit products are summed in 32 bits"
    if processor is not None and not processor.sums_in_32_bits:
        summation = "8-bit products may saturate in 16 bits, and gain less speed than with VNNI"
    decided = "".join(f"; {label}: {text}" for label, text in plan.decided.items())
    totals = Text(
        f"here   {plan.processor}: {summation}{decided}\n"
        f"time   {_seconds(plan.seconds)}{_note(plan.seconds)}\n"
        f"disk   {_bytes(plan.disk_needed_bytes.value)} needed{_note(plan.disk_needed_bytes)}, "
        f"{_bytes(plan.disk_free_bytes)} free at {plan.artifacts}"
    )
    suffix = " (inferred from the model's config)" if plan.task_is_inferred else ""
    parts: list[RenderableType] = [
        Text(f"{plan.recipe}: {plan.task}{suffix}", style="bold"),
        _table("reads", ("what", "from", "size", "state"), _sources(plan.sources)),
        *map(Text, plan.data),
        *(Text(warning, style="yellow") for warning in plan.data_warnings),
        _table(
            "stages",
            ("stage", "gives", "reads", "cached", "time", "peak memory", "disk"),
            [*map(_stage, plan.stages), ("measure", "report", TEST, "-", _seconds(plan.measuring), "-", "-")],
        ),
        *_notes(plan, details),
    ]
    states = [(target.name, "yes" if target.available else "no, will be skipped", target.reason)
              for target in plan.targets]  # fmt: skip
    parts.append(_table("targets", ("target", "here", ""), states))
    if plan.stand_in:
        parts.append(Text(f"none of them can run it: {plan.stand_in} measures the weights instead, in float32"))
    limits = []
    for limit in plan.limits:
        bound = f"{'at least' if limit.at_least is not None else 'at most'} {limit.bound:g}"
        bound += f" of {limit.of}" if limit.of else ""
        limits.append((limit.metric, limit.target, bound + (f" on {limit.processor}" if limit.processor else "")))
    parts += [_table("limits", ("metric", "target", "bound"), limits)] if limits else []
    remarks = (*plan.limit_warnings, *plan.size_warnings, *plan.licence_remarks)
    parts += [Text(remark, style="yellow") for remark in remarks]
    return Group(*parts, *map(Text, plan.plugins), totals)


def render_warnings(plan: Plan) -> RenderableType:
    """Return the plan's warnings, and its totals in one line."""
    warnings = (*plan.data_warnings, *plan.limit_warnings, *plan.size_warnings, *plan.licence_remarks)
    disk = _bytes(plan.disk_needed_bytes.value)
    summary = Text(f"{plan.recipe} can run: {_seconds(plan.seconds)}, {disk} of disk")
    return Group(*(Text(warning, style="yellow") for warning in warnings), summary)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> ResponsiveTable:
    """Return a table that fits the terminal."""
    table = ResponsiveTable(title, [TableColumn(heading) for heading in columns])
    for row in rows:
        table.add(*row)
    return table


def _sources(rows: Sequence[SourcePlan]) -> list[tuple[str, ...]]:
    """Return the table rows of the sources. The first one of each file shows the size of the file."""
    paths = [row.path for row in rows]
    return [_source(row, row.path not in paths[:index]) for index, row in enumerate(rows)]


def _source(row: SourcePlan, shows_size: bool) -> tuple[str, ...]:
    """Return the table row of a source."""
    sizes = [
        f"{row.parameters / 1e6:.1f}M parameters" if row.parameters is not None else "",
        f"{row.rows:,} rows" if row.rows is not None else "",
        _bytes(row.size_bytes) if row.size_bytes is not None and shows_size else "",
    ]
    state = row.status + (f" ({row.note})" if row.note else "")
    return row.role, row.reference, ", ".join(size for size in sizes if size) or "?", state


def _stage(stage: StagePlan) -> tuple[str, ...]:
    """Return the table row of a stage."""
    cached = {True: "yes", False: "no", None: "?"}[stage.cached]
    reads = ", ".join((*stage.reads, *(f"output of {label}" for label in stage.refers_to))) or "-"
    return (
        stage.label,
        re.sub(r"(?<=[a-z])(?=[A-Z])", " ", stage.gives),
        reads,
        cached,
        _seconds(stage.seconds),
        _bytes(stage.peak_memory_bytes.value),
        _bytes(stage.disk_bytes.value),
    )


def _notes(plan: Plan, details: bool) -> list[RenderableType]:
    """Return each note on estimates once, with its stages; without ``details`` only those on unknown values."""
    users: dict[tuple[str, str], list[str]] = {}
    for stage in plan.stages:
        estimates = (("time", stage.seconds), ("memory", stage.peak_memory_bytes), ("disk", stage.disk_bytes))
        for quantity, estimate in estimates:
            if estimate.note != "cached" and (details or estimate.value is None):
                users.setdefault((quantity, estimate.note), []).append(stage.label)
    users.setdefault(("time", plan.measuring.note), []).append("measure")
    lines = [f"{quantity} of {', '.join(labels)}: {note}" for (quantity, note), labels in users.items()]
    return [Text("\n".join(lines), style="dim")] if lines else []


def _note(estimate: Estimate) -> str:
    """Return an estimate's note in parentheses."""
    return f" ({estimate.note})" if estimate.note else ""


def _seconds(estimate: Estimate) -> str:
    """Return a time such as `~50 s`, or `4 to 9 min` if the high end is at least twice the low end."""
    if estimate.value is None:
        return "?"
    if not estimate.value:
        return "0 s"
    low, high = estimate.low or estimate.value, estimate.high or estimate.value
    name, unit = next((name, unit) for name, unit, limit in _UNITS if estimate.value < limit)
    if high < _CERTAIN * low or high < _SHORT_SECONDS:
        return f"~{estimate.value / unit:.{int(unit == 3600)}f} {name}"
    # Two significant digits are enough.
    first, last = (
        f"{end:.1f}" if end < 1 else f"{end:.0f}" if end < 100 else f"{float(f'{end:.2g}'):.0f}"
        for end in (low / unit, high / unit)
    )
    return f"{first} to {last} {name}"


def _bytes(value: float | None) -> str:
    """Return bytes in a readable unit, or `?`."""
    return "?" if value is None else format_bytes(round(value))
