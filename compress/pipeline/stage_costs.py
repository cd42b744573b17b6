"""Predicted costs of stages and of measuring, from the stages' cost models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compress.data.dataset import TEST
from compress.formats.onnx.model import OnnxModel
from compress.formats.registry import FORMATS
from compress.formats.target_profile import TargetProfile
from compress.models.model import TorchModel
from compress.pipeline.formats import format_given
from compress.recipe.recipe import Recipe
from compress.stages.base import AnyStage
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, Text
from compress.stages.protocols import Trains, predict_cost
from compress.stages.registry import STAGES
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, GENERATES
from compress.tasks.registry import TASKS

MEMORY_RANGE, MEASURING_RANGE = (0.8, 1.3), (0.6, 1.8)
"""Lowest and highest factor of the actual cost over a predicted one: of memory, of measuring."""
LIBRARIES_BYTES, GRAPH_BYTES = 560e6, 250e6
"""Resident memory with torch, transformers and the data libraries, and the additional memory of graph libraries."""
_WEIGHT_COPIES = 3
"""Copies of a model's float32 weights that a stage without training holds at once."""
_STILL_HELD = 0.55
"""Share of the memory freed by training that is still held while a graph is changed without data."""
_SETUP_SECONDS = 6.0
"""Libraries, data and the check of the model before the first stage, and the report after the last."""
_LAUNCH_SECONDS, _CALLS_PER_LAUNCH = 0.35, 12
"""Per model and launch of the benchmark: start of its process, and calls that are made whatever the time budget."""
_READ_BYTES_PER_SECOND, _OVER_PEAK = 1e10, 1.2
"""Rate at which a decoder's weights are read per token, and the time of a prompt over that at the peak FLOP rate."""
_GENERATION_BATCH, _TOKEN_SECONDS = 8, 2e-3
"""Texts that are generated together in an evaluation, and the seconds of one more token of each."""
_GRAPH_SPEED = 0.7
"""Time of a forward pass as a graph over its time in torch."""
_ENDS = 2
"""Models that are always measured: the baseline and the final model."""
_INSTRUCTIONS = 56
"""Number of instructions that come with the package."""


def predict_stage_cost(
    stage: AnyStage, input_shape: Shape | None, context: PlanContext, model_type: type[Any], held_bytes: float
) -> Prediction:
    """Return the cost that a stage predicts, with the memory of libraries added.

    A stage that predicts no memory is estimated by its input, unless it reads its input tensor by tensor.

    Args:
        stage: The stage.
        input_shape: Shape of its input, or None if unknown.
        context: Sizes that costs are predicted from.
        model_type: Class that its input is loaded as.
        held_bytes: Memory that the process still holds from earlier stages.

    Raises:
        InputError: If the stage cannot be applied.
    """
    prediction = predict_cost(stage, input_shape, context)
    memory = prediction.peak_memory_bytes
    if memory.value is not None:
        note = memory.note.replace("; without torch itself", "") + ", and libraries"
        memory = Estimate(value=max(memory.value + LIBRARIES_BYTES, held_bytes), note=note)
    elif not isinstance(stage, Trains):
        value, note = held_bytes, "at least the memory held after earlier training"
        if input_shape is not None and model_type in (TorchModel, OnnxModel):
            held_bytes *= 1.0 if model_type is TorchModel or stage.needs().splits else _STILL_HELD
            value = max(LIBRARIES_BYTES + GRAPH_BYTES + _WEIGHT_COPIES * 4 * input_shape.parameters, held_bytes)
            note = "libraries, three copies of the weights, and memory held after earlier training"
        memory = Estimate(value=value, note=note).within(*MEMORY_RANGE) if value else memory
    return replace(prediction, peak_memory_bytes=memory)


def predict_measuring(recipe: Recipe, profiles: Sequence[TargetProfile], context: PlanContext) -> Estimate:
    """Return the seconds beside the stages: each model exported for each target, evaluated and timed.

    ``profiles`` are those of the targets that are available here.
    """
    outputs = recipe.labels() if recipe.benchmark.every_stage else recipe.labels()[-1:]
    labels, launches = list(dict.fromkeys([recipe.baseline, *outputs])), 2 * recipe.benchmark.launches
    rows, budget = context.splits.get(TEST), recipe.benchmark.budget_seconds
    unknown = [] if rows else ["the test rows"]
    shorter = f"to shorten it, set {', '.join(_shortening_fields(recipe, len(labels)))}"
    seconds = _SETUP_SECONDS
    for profile in profiles:
        timing = launches * len(labels) * _LAUNCH_SECONDS
        for label in labels:
            shape = context.shapes.get(label)
            # A model of unknown size makes the prediction a lower bound, which the note says.
            if shape is None:
                unknown.append(f"the size of {label}")
                continue
            # A model that is not in the target's format is written in it first.
            kind = FORMATS[profile.target.format].written_by
            if kind is not None and format_given(recipe, label, False) != profile.target.format:
                writer = STAGES[kind].model_validate({"kind": kind})
                seconds += predict_cost(writer, shape, context).seconds.value or 0.0
            costs = _evaluation_and_timing(recipe, shape, context, rows or Text(0, 0))
            unknown += [] if costs else ["the time of a forward pass"]
            evaluated, timed = costs or (0.0, recipe.benchmark.seconds)
            seconds, timing = seconds + evaluated, timing + timed
        seconds += timing if budget is None else budget
    if unknown:
        note = f"at least: {', '.join(dict.fromkeys(unknown))} not known before a first run here"
        return Estimate(value=seconds, note=f"{note}; {shorter}").within(1.0, 5.0)
    note = f"{len(labels)} models evaluated on {rows.rows if rows else 0:,} rows and timed in {launches} launches"
    return Estimate(value=seconds, note=f"{note}; {shorter}").within(*MEASURING_RANGE)


def _shortening_fields(recipe: Recipe, num_models: int) -> list[str]:
    """Return the fields of the recipe that shorten evaluation and timing, in the order of their usual effect."""
    bench, evaluation = recipe.benchmark, recipe.evaluation
    fields = ["benchmark.every_stage: false"] if bench.every_stage and num_models > _ENDS else []
    fields += ["a lower benchmark.budget_seconds" if bench.budget_seconds else "benchmark.budget_seconds"]
    # A budget replaces the seconds for each model.
    fields += [] if bench.budget_seconds else ["lower benchmark.seconds"]
    if GENERATES in TASKS[recipe.task].capabilities:
        fields += ["lower evaluation.windows" if evaluation.windows else "evaluation.windows"]
        fields += ["lower evaluation.prompts"] if evaluation.prompts else []
    return fields


def _evaluation_and_timing(
    recipe: Recipe, shape: Shape, context: PlanContext, test: Text
) -> tuple[float, float] | None:
    """Return the seconds of evaluating and of timing one model, or None if the time of a forward pass is unknown.

    Args:
        recipe: The recipe.
        shape: Shape of the model.
        context: Sizes that costs are predicted from.
        test: Size of the test split.
    """
    bench, evaluation, task = recipe.benchmark, recipe.evaluation, TASKS[recipe.task].capabilities
    calls, kinds = 2 * bench.launches * _CALLS_PER_LAUNCH, 1 + bench.batched
    if GENERATES in task:
        # Reading text is bound by FLOPs, generating tokens by reading the weights once per token.
        token = 4 * shape.parameters / _READ_BYTES_PER_SECOND
        texts = [test, *(context.splits[split] for split in recipe.data.also if split in context.splits)]
        windows = evaluation.windows
        tokens = sum(windows * context.max_length if windows else context.tokens(text) for text in texts)
        tokens += sum(bench.contexts) * 2 * bench.launches
        reading = 2 * _OVER_PEAK * shape.parameters * tokens / context.rate()
        generated = 2 * evaluation.prompts * evaluation.tokens + 2 * bench.launches * len(bench.contexts) * bench.tokens
        generated += _INSTRUCTIONS * evaluation.answer_tokens if evaluation.instructions else 0
        return reading + generated * token, bench.seconds * len(bench.contexts)
    answer = context.answers(shape, 1.0)
    if answer is None:
        return None
    answer *= _GRAPH_SPEED
    # Each row is answered once. Timed calls repeat a sample of the rows, one at a time and in batches.
    evaluated = answer * test.rows
    timed = bench.seconds * kinds + calls * answer * (1 + bench.batch_size * bench.batched)
    if EXPORTED_FROM_CHECKPOINT in task:
        token = context.max_length * _TOKEN_SECONDS
        return evaluated + test.rows / _GENERATION_BATCH * token, timed + calls * kinds * token
    return evaluated, timed
