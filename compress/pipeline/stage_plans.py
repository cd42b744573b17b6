"""Plans of a recipe's stages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from compress.pipeline.plan import StagePlan
from compress.pipeline.recipe_sources import Sources
from compress.pipeline.stage_benchmark import StageBenchmarks
from compress.pipeline.stage_costs import predict_stage_cost
from compress.recipe.recipe import START, Recipe
from compress.stages.cost_model import Estimate, PlanContext
from compress.stages.protocols import Trains, loaded_type
from compress.utils.errors import CompressError, InputError


def stage_plans(
    recipe: Recipe,
    sources: Sources,
    context: PlanContext,
    is_cached: Callable[[str], bool] | None,
    problems: list[CompressError],
    benchmarks: StageBenchmarks | None,
) -> list[StagePlan]:
    """Return the plans of the stages, up to the first one that cannot be planned.

    Args:
        recipe: The recipe.
        sources: Its model and data.
        context: Sizes that costs are predicted from; the shape of each stage's output is added to it.
        is_cached: Returns True for the label of a stage whose output is in the cache.
        problems: Receives the error of a stage that cannot be planned.
        benchmarks: Timings of stages on a few batches.
    """
    plans: list[StagePlan] = []
    shape, held_bytes = context.shapes[START], 0.0
    for stage, label in zip(recipe.stages, recipe.labels(), strict=True):
        model_type = loaded_type(stage, sources.task.capabilities)
        try:
            cached = is_cached(label) if is_cached and not problems else None
            prediction = predict_stage_cost(stage, label, shape, context, benchmarks, model_type, held_bytes)
        except InputError as error:
            problems.append(error)
            return plans
        if cached:
            nothing = Estimate(value=0, note="cached")
            prediction = replace(prediction, seconds=nothing, peak_memory_bytes=nothing)
        # The allocator keeps the memory that training has freed until the process ends.
        held_bytes = (
            max(held_bytes, prediction.peak_memory_bytes.value or 0.0) if isinstance(stage, Trains) else held_bytes
        )
        shape = context.shapes[label] = prediction.shape
        needs = stage.needs()
        plan = StagePlan(
            label=label,
            kind=stage.kind,
            takes=model_type.__name__,
            gives=stage.output_type().__name__,
            reads=(*needs.splits, *(("unlabeled text",) if needs.unlabeled else ())),
            refers_to=stage.earlier_outputs(),
            cached=cached,
            seconds=prediction.seconds,
            peak_memory_bytes=prediction.peak_memory_bytes,
            disk_bytes=prediction.disk_bytes,
        )
        plans.append(plan)
    return plans
