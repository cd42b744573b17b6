"""The plan of each stage of a recipe, and what a run that followed it says of the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from compress.data.dataset import TEST
from compress.pipeline.plan import Plan, StagePlan, Told
from compress.pipeline.recipe_sources import Sources
from compress.pipeline.stage_benchmark import Trial
from compress.pipeline.stage_costs import TRIAL, told, told_by
from compress.pipeline.time_history import MEASURING, History, Timing
from compress.recipe.recipe import START, Recipe
from compress.results.report import StageRecord
from compress.stages.base import Stage
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape
from compress.utils.errors import CompressError, InputError


def stage_plans(
    recipe: Recipe,
    sources: Sources,
    context: PlanContext,
    is_cached: Callable[[str], bool] | None,
    problems: list[CompressError],
    history: History,
    trial: Trial | None,
) -> list[StagePlan]:
    """The plans, up to a stage that cannot be planned, whose error is added to ``problems``."""
    plans: list[StagePlan] = []
    shape, held = context.shapes[START], 0.0
    for stage, label in zip(recipe.stages, recipe.labels(), strict=True):
        wanted = stage.wants(sources.task.capabilities)
        try:
            cached = is_cached(label) if is_cached and not problems else None
            first = told(stage, label, shape, context, trial, wanted, held)
        except InputError as error:
            problems.append(error)
            return plans
        unit, work = _work(stage, shape, first, context)
        sort, how = f"{stage.kind} by {unit}", told_by(label, trial)
        seconds = history.corrected(first.seconds, sort, recipe.task, how) or (
            None if how == TRIAL else history.seconds(sort, recipe.task, work)
        )
        memory = history.corrected(first.peak_memory_bytes, sort, recipe.task, how, "bytes") or (
            None if how == TRIAL else history.peak_memory(sort, recipe.task, work)
        )
        prediction = replace(
            first, seconds=seconds or first.seconds, peak_memory_bytes=memory or first.peak_memory_bytes
        )
        if cached:
            nothing = Estimate(value=0, note="cached")
            prediction = replace(prediction, seconds=nothing, peak_memory_bytes=nothing)
        # What training has freed is kept at hand for the rest of the process.
        held = max(held, prediction.peak_memory_bytes.value or 0.0) if stage.trains else held
        shape = context.shapes[label] = prediction.shape
        needs = stage.needs()
        plan = StagePlan(
            label=label,
            kind=stage.kind,
            takes=wanted.__name__,
            gives=stage.gives().__name__,
            reads=(*needs.splits, *(("unlabeled text",) if needs.unlabeled else ())),
            refers_to=stage.refers_to(),
            cached=cached,
            work=work,
            work_unit=unit,
            told=Told(by=how, seconds=first.seconds.value, peak_memory_bytes=first.peak_memory_bytes.value),
            seconds=prediction.seconds,
            peak_memory_bytes=prediction.peak_memory_bytes,
            disk_bytes=prediction.disk_bytes,
        )
        plans.append(plan)
    return plans


def _work(
    stage: Stage[Any, Any], before: Shape | None, told: Prediction, plan: PlanContext
) -> tuple[str, float | None]:
    """What the time of a stage grows with, and its unit: FLOPs where they are told; else parameters, examples, or both.

    Of a model that its own code makes the parameters aren't known.
    """
    if told.seconds.flops:
        return "FLOPs", told.seconds.flops
    train = plan.splits.get("train")
    if stage.trains and train is None:
        return "examples", None
    examples = train.rows * getattr(stage, "epochs", 1) if stage.trains and train else 1
    unit = " x ".join([*["parameters"] * (before is not None), *["examples"] * stage.trains])
    return unit or "models", (before.parameters if before is not None else 1) * examples


def timings_of(plan: Plan, ran: Sequence[StageRecord], seconds: float) -> list[Timing]:
    """What a planned run of so many ``seconds`` says of the next: each stage that wasn't cached, and the measuring.

    Of a run whose stages were all cached nothing is said, since its measurements may have been as well.
    """
    planned = {stage.label: stage for stage in plan.stages}
    found = []
    for record in ran:
        stage = planned.get(record.name)
        if stage is not None and stage.work and not record.cached:
            sort = f"{stage.kind} by {stage.work_unit}"
            timing = Timing.now(sort, plan.task, stage.work, record.seconds, record.peak_rss_bytes or 0)
            found.append(timing.model_copy(update=_told(stage.told)))
    rest = seconds - sum(record.seconds + record.check_seconds for record in ran)
    if found and rest > 0:
        rows = next((row.rows for row in plan.sources if row.role == f"split {TEST}"), None)
        timing = Timing.now(MEASURING, plan.task, float(rows or 1), rest, ran[-1].peak_rss_bytes or 0)
        found.append(timing.model_copy(update=_told(plan.told_measuring)))
    return found


def _told(told: Told) -> dict[str, Any]:
    """What was predicted without past runs, in a timing's fields."""
    return {"told_by": told.by, "told_seconds": told.seconds, "told_bytes": told.peak_memory_bytes}
