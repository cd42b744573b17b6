"""Planning of a run for `compress check`: checks and predictions before any model is loaded."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path

from compress.data.dataset import TEST, Dataset
from compress.data.summary import summarize
from compress.formats.quiet_output import quiet_libraries
from compress.formats.runtime import why_unavailable
from compress.formats.target_profile import describe_limits
from compress.formats.targets import REFERENCE
from compress.models import PRUNING_TESTED_TYPES
from compress.models.json_file import read_json
from compress.pipeline.first_batch import check_first_batch
from compress.pipeline.formats import check_formats, unsupported_reason
from compress.pipeline.licences import find_licences, refuse_forbidden, remarks_on
from compress.pipeline.plan import Plan, StagePlan, TargetPlan
from compress.pipeline.recipe_sources import Sources
from compress.pipeline.run_checks import (
    check_artifacts,
    combined_error,
    disk_error,
    free_bytes,
    missing_packages,
    undecided_limits,
    untestable_limits,
)
from compress.pipeline.size_warnings import predicted_warning
from compress.pipeline.stage_costs import predict_measuring, predict_stage_cost
from compress.plugins import plugin_problems
from compress.recipe.recipe import START, Recipe
from compress.sources.resolve import is_graph
from compress.stages.cost_model import Estimate, PlanContext, Shape
from compress.stages.protocols import ChecksModel, Trains, check_stages, loaded_type
from compress.tasks.capability import GENERATES, takes_media
from compress.tasks.registry import TASKS
from compress.utils.environment import cores_quota, granted_cores, processor_class
from compress.utils.errors import CompressError, InputError, RecipeError
from compress.utils.progress import Progress
from compress.utils.torch_device import resolve_device

IsCached = Callable[[str, Dataset], bool]
_UNPACKED = 2
"""Disk space of a fetched sample over its download: the archive and its files."""
_MIN_ROUNDS = 5


def make_plan(
    recipe: Recipe,
    recipe_folder: Path,
    is_cached: IsCached | None = None,
    artifacts: Path = Path("artifacts"),
    looks_into_model: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Read the local data, check that the run can begin, and predict every stage. Loads no weights, downloads nothing.

    Args:
        recipe: The recipe.
        recipe_folder: The folder that relative paths start from.
        is_cached: Returns True for the label of a stage whose output is in the cache, given the recipe's data.
        artifacts: The folder of the cache and the runs.
        looks_into_model: Check formats and stages against the model's structure, which imports torch and runs its
            blocks without weights.
        progress: Receives notes about the data.

    Raises:
        InputError: With all problems at once.
    """
    sources = Sources(recipe, recipe_folder, progress)
    problems, context = sources.problems, plan_context(recipe, sources, sources.find_all())
    _check_requirements(recipe, sources, artifacts)
    stages = _stage_plans(recipe, sources, context, is_cached)
    with sources.noting():
        from_graph = is_graph(recipe.model, recipe_folder)
        # The model's structure is looked at only if the recipe has no other problem, since this imports torch.
        looks_into_model = looks_into_model and not problems
        targets = _target_plans(recipe, sources.start if looks_into_model else None, from_graph)
        if looks_into_model:
            _check_first_batch(recipe, sources)
    # All problems are collected, so that one call of `compress check` shows them together.
    problems += untestable_limits(recipe, sources.task, sources.data) if sources.data else []
    needed, free = _disk_needed(stages, sources), free_bytes(artifacts)
    if needed.value is not None and needed.value > free:
        problems.append(disk_error(needed.value, free, artifacts))
    with sources.noting():
        licences = find_licences(recipe, recipe_folder)
        refuse_forbidden(licences, recipe)
    if problems:
        raise combined_error(problems)
    # Without class names, a split must be downloaded first.
    summary = None
    if sources.data and sources.data.labels and TEST in sources.data.tables:
        tokenizer = sources.start and sources.start / "tokenizer.json"
        summary = summarize(sources.data, tokenizer, recipe.data.max_length)
    available = [profile for profile, target in zip(recipe.profiles(), targets, strict=True) if target.available]
    measuring = predict_measuring(recipe, available or recipe.profiles()[:1], context)
    return Plan(
        recipe=recipe.name,
        task=recipe.task,
        task_is_inferred=recipe.task_is_inferred,
        sources=tuple(sources.rows),
        data=tuple(summary.lines()) if summary else (),
        data_warnings=tuple(summary.warnings()) if summary else (),
        stages=tuple(stages),
        targets=tuple(targets),
        stand_in=None if available else "cpu" if from_graph else REFERENCE.name,
        processor=processor_class(),
        decided=_resolved_fields(recipe),
        limits=recipe.limits,
        limit_warnings=tuple(undecided_limits(recipe, sources.task, sources.data)) if sources.data else (),
        size_warnings=tuple(_size_warnings(recipe, sources, context, stages)),
        measuring=measuring,
        seconds=_total({**{stage.label: stage.seconds for stage in stages}, "measure": measuring}),
        disk_needed_bytes=needed,
        disk_free_bytes=free,
        artifacts=str(artifacts),
        licences=licences,
        licence_remarks=tuple(remarks_on(licences, recipe)),
        plugins=tuple(map(str, plugin_problems())),
    )


def with_problems_of_files(error: RecipeError, recipe_folder: Path) -> InputError:
    """Return the error of a recipe with the problems of its model and its data, if the recipe names them validly."""
    part: Recipe | None = error.valid_part
    if part is None:
        return error
    sources = Sources(part, recipe_folder)
    shape = sources.find_start() if error.model_is_valid else None
    sources.find_data()
    if shape is not None:
        _stage_plans(part, sources, plan_context(part, sources, shape), None)
    problems: list[CompressError] = [error, *sources.problems]
    return combined_error(problems) if sources.problems else error


def _size_warnings(
    recipe: Recipe, sources: Sources, context: PlanContext, stages: Sequence[StagePlan]
) -> Iterator[str]:
    """Yield a warning if the last stage's output is predicted to be larger than the given model."""
    if sources.start is not None and stages:
        last = stages[-1]
        shape, size = context.shapes[last.label], last.disk_bytes.value
        if warning := predicted_warning(recipe, sources.start, shape, size):
            yield warning


def _check_requirements(recipe: Recipe, sources: Sources, artifacts: Path) -> None:
    """Record packages and devices that are missing, an unusable artifacts folder, and stages that do not apply."""
    sources.problems += missing_packages(recipe)
    with sources.noting():
        resolve_device(recipe.device)
    with sources.noting():
        check_artifacts(artifacts)
    sources.problems += _inapplicable_stages(recipe, sources) if not sources.problems else []


def _stage_plans(recipe: Recipe, sources: Sources, context: PlanContext, is_cached: IsCached | None) -> list[StagePlan]:
    """Return the plans of the stages, up to the first one that cannot be planned, whose error becomes a problem.

    Args:
        recipe: The recipe.
        sources: Its model and data.
        context: Sizes that costs are predicted from; the shape of each stage's output is added to it.
        is_cached: Returns True for the label of a stage whose output is in the cache, given the recipe's data.
    """
    plans: list[StagePlan] = []
    shape, held_bytes = context.shapes[START], 0.0
    for number, (stage, label) in enumerate(zip(recipe.stages, recipe.labels(), strict=True)):
        model_type = loaded_type(stage, sources.task.capabilities)
        try:
            cached = is_cached(label, sources.data) if is_cached and sources.data and not sources.problems else None
            prediction = predict_stage_cost(stage, shape, context, model_type, held_bytes)
        except InputError as error:
            error.where = error.where or f"stages.{number}.{stage.kind}"
            sources.problems.append(error)
            return plans
        # The shape of a cached output is still needed for the stages after it.
        if cached:
            nothing = Estimate(value=0, note="cached")
            prediction = replace(prediction, seconds=nothing, peak_memory_bytes=nothing)
        # The allocator keeps the memory that training has freed until the process ends.
        if isinstance(stage, Trains):
            held_bytes = max(held_bytes, prediction.peak_memory_bytes.value or 0.0)
        shape = context.shapes[label] = prediction.shape
        needs = stage.needs()
        plan = StagePlan(
            label=label,
            kind=stage.kind,
            takes=model_type.__name__,
            gives=stage.output_type.__name__,
            reads=(*needs.splits, *(("unlabeled text",) if needs.unlabeled else ())),
            refers_to=stage.earlier_outputs(),
            cached=cached,
            seconds=prediction.seconds,
            peak_memory_bytes=prediction.peak_memory_bytes,
            disk_bytes=prediction.disk_bytes,
        )
        plans.append(plan)
    return plans


def _resolved_fields(recipe: Recipe) -> dict[str, str]:
    """Return the fields that depend on the processor, such as `reduce_range: auto is saturating`, by stage label."""
    texts = {}
    for label, stage, resolved in zip(recipe.labels(), recipe.stages, recipe.resolved().stages, strict=True):
        written, effective = stage.model_dump(mode="json"), resolved.model_dump(mode="json")
        changed = [name for name in written if written[name] != effective[name]]
        if changed:
            values = (f"{name}: {written[name]} is {json.dumps(effective[name])}" for name in changed)
            texts[label] = ", ".join(values).replace('"', "")
    return texts


def plan_context(recipe: Recipe, sources: Sources, start: Shape | None) -> PlanContext:
    """Return what stages predict their costs from; ``start`` is the starting model's shape, or None if unknown."""
    texts = sources.texts
    return PlanContext(
        max_length=recipe.data.max_length,
        reads_text=all(column.kind == "text" for column in sources.task.columns),
        splits={split: texts[role] for split in recipe.data.splits if (role := f"split {split}") in texts},
        unlabeled={name: texts.get(f"unlabeled {name}") for name in recipe.data.unlabeled},
        find_model=sources.named_model,
        rate=functools.cache(lambda: machine_flops_per_second()),
        shapes={START: start},
        generates=GENERATES in sources.task.capabilities,
    )


def machine_flops_per_second(budget_seconds: float = 0.02) -> float:
    """Return the FLOP rate of this machine: the best fp32 matrix product on one core, times the cores granted."""
    import numpy as np

    # OpenBLAS multiplies matrices up to this size (2^18 multiplications) in one thread. Several threads would wait for
    # each other on a busy machine, or in a container that grants fewer cores than it shows.
    size = 64
    left = np.full((size, size), 0.5, dtype=np.float32)
    left @ left  # the first product initializes the library, which may take longer than the whole budget
    rounds: list[float] = []
    end = time.perf_counter() + budget_seconds
    while time.perf_counter() < end or len(rounds) < _MIN_ROUNDS:
        start = time.perf_counter()
        for _ in range(8):
            left @ left
        rounds.append(time.perf_counter() - start)
    cores = min(len(granted_cores()), cores_quota() or float("inf"))
    return 8 * 2 * size**3 / min(rounds) * max(cores, 1)


def _disk_needed(stages: Sequence[StagePlan], sources: Sources) -> Estimate:
    """Return the bytes of outputs that are not cached, of the final copy in the run's folder, and of downloads."""
    written = {stage.label: stage.disk_bytes for stage in stages if not stage.cached}
    total = _total(written | ({"the final copy": stages[-1].disk_bytes} if stages else {}))
    # A download needs the archive and the unpacked files at the same time.
    fetched = sum(sources.downloads.values()) * _UNPACKED
    return Estimate(value=(total.value or 0) + fetched or None, note=total.note)


def _total(estimates: Mapping[str, Estimate]) -> Estimate:
    """Return the sum of the estimates that have a value; the note names the labels of the others."""
    known = [(estimate.value, estimate) for estimate in estimates.values() if estimate.value is not None]
    unknown = [label for label, estimate in estimates.items() if estimate.value is None]
    note = f"without {', '.join(unknown)}" if unknown else ""
    if not known:
        return Estimate.unknown(note)
    # An estimate without a range counts with its value at both ends.
    return Estimate(
        value=sum(value for value, _ in known),
        note=note,
        low=sum(estimate.low or value for value, estimate in known),
        high=sum(estimate.high or value for value, estimate in known),
    )


def _target_plans(recipe: Recipe, start: Path | None, from_graph: bool) -> list[TargetPlan]:
    """Return whether each target can be measured here, with the reason if not, or with its description and limits.

    Args:
        recipe: The recipe.
        start: Folder of the starting model if its structure is looked at.
        from_graph: Whether the starting model is an ONNX file.

    Raises:
        CompressError: For formats or stages that the model's structure does not allow.
    """
    folder = start if start is not None and (start / "config.json").is_file() else None
    plans = []
    for profile in recipe.profiles():
        target = profile.target
        reason = why_unavailable(target) or unsupported_reason(recipe, folder, target, from_graph)
        about = [target.description, target.format, *describe_limits(profile)]
        about += [f"measured here, not on {profile.instead_of}"] if profile.instead_of else []
        about += [f"timed on {profile.device}"] if profile.device else []
        plans.append(TargetPlan(name=target.name, available=reason is None, reason=reason or "; ".join(about)))
    if folder is not None:
        check_formats(recipe, folder)
        if GENERATES in TASKS[recipe.task].capabilities:
            check_stages(recipe.stages, folder)
    return plans


def _check_first_batch(recipe: Recipe, sources: Sources) -> None:
    """Check that test rows pass through the model's preprocessing, if both are local. Raises `InputError`."""
    start, data = sources.start, sources.data
    if start is None or data is None or not (start / "config.json").is_file():
        return
    # Texts pass without transformers, whose import takes seconds.
    if takes_media(sources.task.capabilities):
        quiet_libraries()
    check_first_batch(sources.task, start, data, recipe.data.max_length)


def _inapplicable_stages(recipe: Recipe, sources: Sources) -> list[CompressError]:
    """Return one error for each stage that cannot be applied to the starting model, up to one that replaces the model.

    Types of models that all stages are tested with are not checked: importing torch would take seconds.
    """
    folder = sources.start
    if folder is None or not (folder / "config.json").is_file():
        return []
    if read_json(folder / "config.json").get("model_type") in PRUNING_TESTED_TYPES:
        return []
    quiet_libraries()
    errors: list[CompressError] = []
    for number, stage in enumerate(takewhile(lambda stage: not stage.references(), recipe.stages)):
        try:
            if isinstance(stage, ChecksModel):
                stage.check_model(folder)
        except CompressError as error:
            error.where = error.where or f"stages.{number}.{stage.kind}"
            errors.append(error)
    return errors
