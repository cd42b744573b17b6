"""What stages and measuring cost: by the stages' own arithmetic, by a trial of them, and by past runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from compress.data.dataset import TEST
from compress.formats.onnx.model import OnnxModel
from compress.formats.registry import FORMATS
from compress.formats.target_profile import Profile
from compress.models.torch_model import TorchModel
from compress.pipeline.format_support import format_given
from compress.pipeline.stage_benchmark import StageTrial, Trial
from compress.recipe.recipe import START, Recipe
from compress.stages.base import Stage
from compress.stages.cost_model import Estimate, PlanContext, Prediction, Shape, Text, predicted
from compress.stages.registry import STAGES
from compress.tasks.capability import GENERATES, IS_WRITTEN
from compress.tasks.registry import get_task

ARITHMETIC, TRIAL = "arithmetic", "trial"
OF_TRIAL, OF_MEMORY, OF_MEASURING = (0.75, 1.35), (0.8, 1.3), (0.6, 1.8)
"""How many times as much it may be, that is predicted by a trial, of memory, and of measuring."""
LIBRARIES_BYTES, GRAPH_BYTES = 560e6, 250e6
"""Resident memory with torch, transformers and data's libraries; and what those of graphs add."""
_COPIES = 3
"""Copies of a model's float32 weights that a stage without training has at once."""
_GROWTH = 1.2
"""What a long training comes to hold, of what a few batches do."""
_STILL_HELD = 0.55
"""The part of what training has kept at hand that is there yet while a graph is changed without data."""
_BEGINNING_SECONDS = 6.0
"""Libraries, data and the model's check before the first stage, and the report after the last."""
_LAUNCH_SECONDS, _CALLS_A_LAUNCH = 0.35, 12
"""Of each model in each launch of the bench: its process's start, and rounds of calls that are made in any case."""
_READ_BYTES_PER_SECOND, _OVER_PEAK = 1e10, 1.2
"""How fast a decoder's weights are read for a token, and how many times longer than at the peak rate a prompt takes."""
_WRITTEN_AT_ONCE, _TOKEN_SECONDS = 8, 2e-3
"""Texts that are written together where they are judged, and what one more token of each takes."""
_GRAPH_SPEED = 0.7
"""A graph answers in so much of the time that torch takes."""
_INSTRUCTIONS = 56
"""As many as come with the package."""


def told_by(label: str, trial: Trial | None) -> str:
    """How the cost of a stage is predicted without past runs."""
    return TRIAL if trial is not None and label in trial.stages else ARITHMETIC


def told(
    stage: Stage[Any, Any],
    label: str,
    before: Shape | None,
    plan: PlanContext,
    trial: Trial | None,
    wanted: type[Any],
    held: float,
) -> Prediction:
    """What a stage says that it costs, or what a trial of it does, which knows more.

    ``wanted`` is the class that its input is loaded as; ``held``: bytes that the process has kept from stages before.
    Raises `InputError` as the stage does.
    """
    found = stage.predict(before, plan)
    tried = trial.stages.get(label) if trial else None
    if tried is None or trial is None:
        return _without_trial(stage, found, before, trial, wanted, held)
    if found.shape is None or stage.decides_shape_by_data:
        found = predicted(before, tried.shape, found.seconds, found.peak_memory_bytes)
    seconds = _tried_seconds(stage, tried, plan, trial)
    memory = _tried_memory(stage, tried, plan, trial, held)
    return replace(found, seconds=seconds or found.seconds, peak_memory_bytes=memory or found.peak_memory_bytes)


def _tried_seconds(stage: Stage[Any, Any], tried: StageTrial, plan: PlanContext, trial: Trial) -> Estimate | None:
    examples = _examples(stage, plan)
    if examples is None:
        return None
    read, learned = stage.passes(examples)
    judged = plan.splits.get("validation")
    validated = trial.answer_seconds * judged.rows * learned / max(examples, 1.0) if judged else 0.0
    # All rows become inputs, of whatever part of them the stage reads.
    rest = trial.encode_seconds * (examples - read) if stage.needs().splits and stage.trains else 0.0
    value = tried.seconds + rest + tried.example_seconds * read + tried.step_seconds * learned + validated
    each = (tried.example_seconds * read + tried.step_seconds * learned) / max(read, learned, 1.0)
    note = f"tried here on a few batches: {each * 1e3:.3g} ms for each of {max(read, learned):,.0f} examples"
    note = note if stage.trains else "tried here on all rows"
    return Estimate(value=value, note=note).within(*OF_TRIAL)


def _tried_memory(
    stage: Stage[Any, Any], tried: StageTrial, plan: PlanContext, trial: Trial, held: float
) -> Estimate | None:
    examples = _examples(stage, plan)
    if examples is None:
        return None
    encoded = trial.example_bytes * (examples if stage.needs().splits else 0.0) * (1 + len(stage.refers_to()))
    value = _GROWTH * (tried.peak_rss_bytes + encoded)
    note = "tried here on the longest examples, with torch and all examples"
    return Estimate(value=max(value, held), note=note).within(*OF_MEMORY)


def _examples(stage: Stage[Any, Any], plan: PlanContext) -> float | None:
    """Rows of the training split, and of unlabeled text where the stage reads it; None where they aren't here."""
    train = plan.splits.get("train")
    more: list[Text | None] = [*plan.unlabeled.values()] if stage.needs().unlabeled else []
    if train is None or None in more:
        return None
    return float(train.rows + sum(text.rows for text in more if text))


def _without_trial(
    stage: Stage[Any, Any],
    found: Prediction,
    before: Shape | None,
    trial: Trial | None,
    wanted: type[Any],
    held: float,
) -> Prediction:
    """The stage's own prediction, with the memory of the libraries that it doesn't count.

    Of one that says nothing it goes by its input, unless that is read tensor by tensor.
    """
    memory, ready = found.peak_memory_bytes, float(trial.ready_bytes) if trial else LIBRARIES_BYTES
    if memory.value is not None:
        note = memory.note.replace("; without torch itself", "") + ", and libraries"
        memory = Estimate(value=max(memory.value + ready, held), note=note)
    elif before is not None and not stage.trains and wanted in (TorchModel, OnnxModel):
        held *= 1.0 if wanted is TorchModel or stage.needs().splits else _STILL_HELD
        value = ready + GRAPH_BYTES + _COPIES * 4 * before.parameters
        note = "libraries, three copies of the weights, and what training before has left"
        memory = Estimate(value=max(value, held), note=note).within(*OF_MEMORY)
    elif held and not stage.trains:
        memory = Estimate(value=held, note="at least what training before has left").within(*OF_MEMORY)
    return replace(found, peak_memory_bytes=memory)


def measuring(recipe: Recipe, profiles: Sequence[Profile], plan: PlanContext, trial: Trial | None) -> Estimate:
    """Seconds of everything beside the stages: each model written for each of these targets, judged and timed."""
    labels, launches = _measured(recipe), 2 * recipe.benchmark.launches
    rows = plan.splits.get(TEST)
    unknown = [] if rows else ["the test rows"]
    seconds = _BEGINNING_SECONDS
    for profile in profiles:
        spent = []
        for label in labels:
            shape = plan.shapes.get(label)
            if shape is None:
                unknown.append(f"the size of {label}")
                continue
            seconds += _writing(recipe, profile, label, shape, plan)
            one = _judged_and_timed(recipe, shape, plan, trial, rows or Text(0, 0))
            unknown += [] if one else ["what an answer costs"]
            spent.append(one or (0.0, recipe.benchmark.seconds))
        seconds += sum(judged for judged, _ in spent)
        budget = recipe.benchmark.budget_seconds
        starts = launches * len(labels) * _LAUNCH_SECONDS
        seconds += budget if budget is not None else starts + sum(timed for _, timed in spent)
    if unknown:
        note = f"at least: {', '.join(dict.fromkeys(unknown))} not known before a first run here"
        return Estimate(value=seconds, note=note).within(1.0, 5.0)
    note = f"{len(labels)} models judged on {rows.rows if rows else 0:,} rows and timed in {launches} launches"
    return Estimate(value=seconds, note=note).within(*OF_MEASURING)


def _writing(recipe: Recipe, profile: Profile, label: str, shape: Shape, plan: PlanContext) -> float:
    """Seconds in which a model gets into a target's format, where it isn't in it."""
    kind = FORMATS[profile.target.format].written_by
    if kind is None or format_given(recipe, label, False) == profile.target.format:
        return 0.0
    return STAGES[kind].model_validate({"kind": kind}).predict(shape, plan).seconds.value or 0.0


def _judged_and_timed(
    recipe: Recipe, shape: Shape, plan: PlanContext, trial: Trial | None, test: Text
) -> tuple[float, float] | None:
    """Seconds in which one model is judged, and in which it is timed; None where an answer's are not known.

    In every launch it makes some calls in any case, and for as long as the recipe says where there is more time.
    """
    bench, judged, task = recipe.benchmark, recipe.evaluation, get_task(recipe.task).capabilities
    calls, kinds = 2 * bench.launches * _CALLS_A_LAUNCH, 1 + bench.batched
    if GENERATES in task:
        token = 4 * shape.parameters / _READ_BYTES_PER_SECOND
        texts = [test, *(plan.splits[split] for split in recipe.data.also if split in plan.splits)]
        tokens = sum(judged.windows * plan.max_length if judged.windows else plan.tokens(text) for text in texts)
        tokens += sum(bench.contexts) * 2 * bench.launches
        passes = 2 * _OVER_PEAK * shape.parameters * tokens / plan.rate()
        written = 2 * judged.prompts * judged.tokens + 2 * bench.launches * len(bench.contexts) * bench.tokens
        written += _INSTRUCTIONS * judged.answer_tokens if judged.instructions else 0
        return passes + written * token, bench.seconds * len(bench.contexts)
    answer = plan.answers(shape, 1.0)
    if answer is None:
        return None
    answer *= _GRAPH_SPEED
    encoding = trial.encode_seconds if trial else 0.0
    spent = (answer + encoding) * test.rows
    timed = bench.seconds * kinds + calls * answer * (1 + bench.batch_size * bench.batched)
    if IS_WRITTEN in task:
        token = plan.max_length * _TOKEN_SECONDS
        return spent + test.rows / _WRITTEN_AT_ONCE * token, timed + calls * kinds * token
    return spent, timed


def _measured(recipe: Recipe) -> list[str]:
    """Labels of the models that are judged and timed, each once."""
    labels = recipe.labels()
    others = labels if recipe.benchmark.every_stage else labels[-1:]
    return list(dict.fromkeys([recipe.baseline if recipe.baseline != START else START, *others]))
