"""Predicted costs of stages and of measuring, from the stages' cost models and from a benchmark of stages."""

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
from compress.pipeline.stage_benchmark import StageBenchmarks
from compress.recipe.recipe import Recipe
from compress.stages.base import AnyStage
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, Text, predicted
from compress.stages.protocols import SizedByData, Trains, data_passes, predict_cost
from compress.stages.registry import STAGES
from compress.tasks.capability import EXPORTED_FROM_CHECKPOINT, GENERATES
from compress.tasks.registry import get_task

BENCHMARK_RANGE, MEMORY_RANGE, MEASURING_RANGE = (0.75, 1.35), (0.8, 1.3), (0.6, 1.8)
"""Lowest and highest factor of the actual cost over a predicted one: from a benchmark, of memory, of measuring."""
LIBRARIES_BYTES, GRAPH_BYTES = 560e6, 250e6
"""Resident memory with torch, transformers and the data libraries, and the additional memory of graph libraries."""
_WEIGHT_COPIES = 3
"""Copies of a model's float32 weights that a stage without training holds at once."""
_MEMORY_GROWTH = 1.2
"""Peak memory of a long training over the peak of a few batches."""
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
_INSTRUCTIONS = 56
"""Number of instructions that come with the package."""


def predict_stage_cost(
    stage: AnyStage,
    label: str,
    input_shape: Shape | None,
    context: PlanContext,
    benchmarks: StageBenchmarks | None,
    model_type: type[Any],
    held_bytes: float,
) -> Prediction:
    """Return the cost of a stage, from its benchmark if there is one, else from the stage's own cost model.

    Args:
        stage: The stage.
        label: Its label.
        input_shape: Shape of its input, or None if unknown.
        context: Sizes that costs are predicted from.
        benchmarks: Timings of stages on a few batches.
        model_type: Class that its input is loaded as.
        held_bytes: Memory that the process still holds from earlier stages.

    Raises:
        InputError: If the stage cannot be applied.
    """
    prediction = predict_cost(stage, input_shape, context)
    timing = benchmarks.stages.get(label) if benchmarks else None
    if timing is None or benchmarks is None:
        return _with_library_memory(stage, prediction, input_shape, benchmarks, model_type, held_bytes)
    if prediction.shape is None or isinstance(stage, SizedByData):
        prediction = predicted(input_shape, timing.shape, prediction.seconds, prediction.peak_memory_bytes)
    # Without the number of examples there is nothing to scale the benchmark by.
    needs, train = stage.needs(), context.splits.get("train")
    unlabeled: list[Text | None] = [*context.unlabeled.values()] if needs.unlabeled else []
    if train is None or None in unlabeled:
        return prediction
    examples = float(train.rows + sum(text.rows for text in unlabeled if text))
    # The seconds of a stage, scaled from its benchmark to all examples.
    read, trained = data_passes(stage, examples)
    validation = context.splits.get("validation")
    validated = benchmarks.answer_seconds * validation.rows * trained / max(examples, 1.0) if validation else 0.0
    # All rows are encoded, even if the stage reads a part of them.
    on_all_rows = isinstance(stage, SizedByData)
    unread = benchmarks.encode_seconds * (examples - read) if needs.splits and not on_all_rows else 0.0
    per_example = timing.example_seconds * read + timing.step_seconds * trained
    count = max(read, trained, 1.0)
    note = f"benchmarked here on a few batches: {per_example / count * 1e3:.3g} ms for each of {count:,.0f} examples"
    note = "benchmarked here on all rows" if on_all_rows else note
    seconds = Estimate(value=timing.seconds + unread + per_example + validated, note=note)
    # Memory has all encoded examples beside the peak of a few batches.
    encoded = benchmarks.example_bytes * (examples if needs.splits else 0.0) * (1 + len(stage.earlier_outputs()))
    memory = Estimate(
        value=max(_MEMORY_GROWTH * (timing.peak_rss_bytes + encoded), held_bytes),
        note="benchmarked here on the longest examples, with torch and all examples",
    )
    return replace(prediction, seconds=seconds.within(*BENCHMARK_RANGE), peak_memory_bytes=memory.within(*MEMORY_RANGE))


def _with_library_memory(
    stage: AnyStage,
    prediction: Prediction,
    input_shape: Shape | None,
    benchmarks: StageBenchmarks | None,
    model_type: type[Any],
    held_bytes: float,
) -> Prediction:
    """Return the stage's own prediction with the memory of libraries added.

    A stage that predicts no memory is estimated by its input, unless it reads its input tensor by tensor.

    Args:
        stage: The stage.
        prediction: Its own prediction.
        input_shape: Shape of its input, or None if unknown.
        benchmarks: Memory with libraries, data and model loaded.
        model_type: Class that its input is loaded as.
        held_bytes: Memory that the process still holds from earlier stages.
    """
    memory, ready = prediction.peak_memory_bytes, float(benchmarks.ready_bytes) if benchmarks else LIBRARIES_BYTES
    if memory.value is not None:
        note = memory.note.replace("; without torch itself", "") + ", and libraries"
        memory = Estimate(value=max(memory.value + ready, held_bytes), note=note)
    elif input_shape is not None and not isinstance(stage, Trains) and model_type in (TorchModel, OnnxModel):
        held_bytes *= 1.0 if model_type is TorchModel or stage.needs().splits else _STILL_HELD
        value = ready + GRAPH_BYTES + _WEIGHT_COPIES * 4 * input_shape.parameters
        note = "libraries, three copies of the weights, and memory held after earlier training"
        memory = Estimate(value=max(value, held_bytes), note=note).within(*MEMORY_RANGE)
    elif held_bytes and not isinstance(stage, Trains):
        memory = Estimate(value=held_bytes, note="at least the memory held after earlier training")
        memory = memory.within(*MEMORY_RANGE)
    return replace(prediction, peak_memory_bytes=memory)


def predict_measuring(
    recipe: Recipe, profiles: Sequence[TargetProfile], context: PlanContext, benchmarks: StageBenchmarks | None
) -> Estimate:
    """Return the seconds beside the stages: each model exported for each target, evaluated and timed.

    Args:
        recipe: The recipe.
        profiles: Targets that are available here.
        context: Sizes that costs are predicted from.
        benchmarks: Time of encoding and of a forward pass.
    """
    outputs = recipe.labels() if recipe.benchmark.every_stage else recipe.labels()[-1:]
    labels, launches = list(dict.fromkeys([recipe.baseline, *outputs])), 2 * recipe.benchmark.launches
    rows = context.splits.get(TEST)
    unknown = [] if rows else ["the test rows"]
    seconds = _SETUP_SECONDS
    for profile in profiles:
        evaluations_and_timings = []
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
            costs = _evaluation_and_timing(recipe, shape, context, benchmarks, rows or Text(0, 0))
            unknown += [] if costs else ["the time of a forward pass"]
            evaluations_and_timings.append(costs or (0.0, recipe.benchmark.seconds))
        seconds += sum(evaluation for evaluation, _ in evaluations_and_timings)
        budget = recipe.benchmark.budget_seconds
        starts = launches * len(labels) * _LAUNCH_SECONDS
        seconds += budget if budget is not None else starts + sum(timing for _, timing in evaluations_and_timings)
    if unknown:
        note = f"at least: {', '.join(dict.fromkeys(unknown))} not known before a first run here"
        return Estimate(value=seconds, note=note).within(1.0, 5.0)
    note = f"{len(labels)} models evaluated on {rows.rows if rows else 0:,} rows and timed in {launches} launches"
    return Estimate(value=seconds, note=note).within(*MEASURING_RANGE)


def _evaluation_and_timing(
    recipe: Recipe, shape: Shape, context: PlanContext, benchmarks: StageBenchmarks | None, test: Text
) -> tuple[float, float] | None:
    """Return the seconds of evaluating and of timing one model, or None if the time of a forward pass is unknown.

    Args:
        recipe: The recipe.
        shape: Shape of the model.
        context: Sizes that costs are predicted from.
        benchmarks: Time of encoding.
        test: Size of the test split.
    """
    bench, evaluation, task = recipe.benchmark, recipe.evaluation, get_task(recipe.task).capabilities
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
    encoding = benchmarks.encode_seconds if benchmarks else 0.0
    # Each row is encoded and answered once. Timed calls repeat a sample of the rows, one at a time and in batches.
    evaluated = (answer + encoding) * test.rows
    timed = bench.seconds * kinds + calls * answer * (1 + bench.batch_size * bench.batched)
    if EXPORTED_FROM_CHECKPOINT in task:
        token = context.max_length * _TOKEN_SECONDS
        return evaluated + test.rows / _GENERATION_BATCH * token, timed + calls * kinds * token
    return evaluated, timed
