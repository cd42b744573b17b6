"""The plan of a run: what `compress check` proves and predicts before any model is loaded."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from compress.data.dataset import TEST
from compress.formats.runtimes import why_unavailable
from compress.formats.silence import quiet_libraries
from compress.formats.target_profile import Profile, limit_words
from compress.formats.targets import REFERENCE
from compress.models import PRUNING_TESTED_TYPES
from compress.models.json_file import read_json
from compress.pipeline.format_support import check_formats, why_not
from compress.pipeline.licences import find_licences, refuse_forbidden
from compress.pipeline.machine_speed import machine_flops_per_second
from compress.pipeline.plan import Plan, StagePlan, TargetPlan, Told, render_plan
from compress.pipeline.recipe_sources import Sources
from compress.pipeline.stage_benchmark import Trial, tried
from compress.pipeline.stage_costs import ARITHMETIC, TRIAL, measuring
from compress.pipeline.stage_plans import stage_plans, timings_of
from compress.pipeline.time_history import MEASURING, History
from compress.plugins import plugin_problems
from compress.recipe.recipe import START, Recipe
from compress.results.report import LicenceRecord
from compress.sources.resolve import is_graph
from compress.stages.base import Stage
from compress.stages.cost_model import Estimate, PlanContext, Shape
from compress.stages.model_checks import check_stages
from compress.stages.training.settings import Training
from compress.tasks.capability import DRAWS, GENERATES, READS_ROWS
from compress.tasks.registry import get_task
from compress.utils.environment import processor_class
from compress.utils.errors import CompressError, InputError, MissingExtraError, ModelError, StageError
from compress.utils.installation import extra_containing, has_package
from compress.utils.progress import Progress, SilentProgress
from compress.utils.torch_device import resolve_device

__all__ = ["History", "Plan", "make_plan", "plan_context", "render_plan", "timings_of"]

UNPACKED = 2
"""A fetched sample takes its download and about as much again for its files."""
_STEPS_WORTH_A_TRIAL = 100


def make_plan(
    recipe: Recipe,
    recipe_folder: Path,
    is_cached: Callable[[str], bool] | None = None,
    artifacts: Path = Path("artifacts"),
    looks_into_model: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """Find every source, predict every stage, prove that the run can begin. Loads no weights, fetches nothing.

    ``is_cached`` says of a stage's label whether its output is there; an `InputError` of it counts as a problem.
    With ``looks_into_model`` formats are asked whether they have a place for a language model, and stages whether they
    can be applied to it, which imports torch and runs the model's blocks without their weights; and stages that train
    for long are tried on a few batches in a process of their own, once, if everything is here. Raises `InputError` with
    all problems.
    """
    sources = Sources(recipe, recipe_folder)
    start = sources.find_all()
    problems = sources.problems
    problems += _missing_packages(recipe)
    try:
        resolve_device(recipe.device)
    except InputError as error:
        problems.append(error)
    problems += _unfit(recipe, sources) if not problems else []
    if artifacts.exists() and not artifacts.is_dir():
        problems.append(InputError("The place for artifacts is a file.", where=str(artifacts), expected="a folder"))
    history = History(artifacts)
    trial = None
    if not problems and _is_here(sources):
        makes = looks_into_model and _worth_a_trial(recipe, sources, is_cached)
        try:
            trial = tried(recipe, recipe_folder, artifacts, makes, progress or SilentProgress())
        except InputError as error:
            problems.append(error)
    context = plan_context(recipe, sources, start or (trial.start if trial else None), trial)
    stages = stage_plans(recipe, sources, context, is_cached, problems, history, trial)
    folder = sources.start if looks_into_model and not problems else None
    folder = folder if folder is not None and (folder / "config.json").is_file() else None
    from_graph = False
    try:
        from_graph = is_graph(recipe.model, recipe_folder)
        targets = tuple(_target_plan(profile, recipe, folder, from_graph) for profile in recipe.profiles())
        if folder is not None:
            check_formats(recipe, folder)
            if GENERATES in get_task(recipe.task).capabilities:
                check_stages(recipe.stages, folder)
    except (ModelError, StageError, InputError) as error:
        problems.append(error)
    needed, free = _disk_needed(stages, sources), _free_bytes(artifacts)
    if needed.value is not None and needed.value > free:
        what = f"The run needs about {needed.value / 1e9:.2f} GB of disk, and {free / 1e9:.2f} GB are free."
        hint = "Free some space (`compress cache prune`), or give --artifacts on another disk."
        problems.append(InputError(what, where=str(artifacts), hint=hint))
    licences, remarks = _licences(recipe, recipe_folder, problems)
    if problems:
        raise _all(problems)
    stand_in = None if any(one.available for one in targets) else "cpu" if from_graph else REFERENCE.name
    there = [profile for profile, one in zip(recipe.profiles(), targets, strict=True) if one.available]
    told_measuring = measuring(recipe, there or recipe.profiles()[:1], context, trial)
    how = TRIAL if trial else ARITHMETIC
    measured = (
        history.corrected(told_measuring, MEASURING, recipe.task, how)
        or history.seconds(MEASURING, recipe.task, _judged_rows(sources))
        or told_measuring
    )
    return Plan(
        recipe=recipe.name,
        task=recipe.task,
        task_is_told=recipe.task_is_told,
        sources=tuple(sources.rows),
        stages=tuple(stages),
        targets=targets,
        stand_in=stand_in,
        processor=processor_class(),
        decided=_decided(recipe),
        limits=recipe.limits,
        measuring=measured,
        told_measuring=Told(by=how, seconds=told_measuring.value),
        seconds=_total(
            [*(stage.seconds for stage in stages), measured], [*(stage.label for stage in stages), "measuring"]
        ),
        disk_needed_bytes=needed,
        disk_free_bytes=free,
        artifacts=str(artifacts),
        licences=licences,
        licence_remarks=remarks,
        plugins=tuple(map(str, plugin_problems())),
    )


def _licences(
    recipe: Recipe, folder: Path, problems: list[CompressError]
) -> tuple[tuple[LicenceRecord, ...], tuple[str, ...]]:
    """What sources that are here say of their licences, and what follows; what is forbidden is a problem."""
    try:
        found = find_licences(recipe, folder)
        return found, tuple(refuse_forbidden(found, recipe))
    except InputError as error:
        problems.append(error)
        return (), ()


def _decided(recipe: Recipe) -> dict[str, str]:
    """`reduce_range: auto is saturating`, by the label of the stage."""
    found = {}
    for label, written, settled in zip(recipe.labels(), recipe.stages, recipe.settled().stages, strict=True):
        before, after = written.model_dump(mode="json"), settled.model_dump(mode="json")
        changed = [name for name in before if before[name] != after[name]]
        if changed:
            values = (f"{name}: {before[name]} is {json.dumps(after[name])}" for name in changed)
            found[label] = ", ".join(values).replace('"', "")
    return found


def _is_here(sources: Sources) -> bool:
    """Whether nothing has to be fetched."""
    return all(row.status == "here" for row in sources.rows)


def _worth_a_trial(recipe: Recipe, sources: Sources, is_cached: Callable[[str], bool] | None) -> bool:
    """Whether training that is not in the cache takes so many steps that trying a few of them first is little.

    No plan runs the code of a recipe's module, or that of a model's repository; running text has no rows to try, and a
    model that draws pictures no one call.
    """
    train = sources.texts.get("split train")
    if train is None or recipe.module is not None or recipe.trust_remote_code:
        return False
    if READS_ROWS not in sources.task.capabilities or DRAWS in sources.task.capabilities:
        return False
    try:
        return any(
            stage.passes(train.rows)[1] / getattr(stage, "batch_size", 1) >= _STEPS_WORTH_A_TRIAL
            for label, stage in zip(recipe.labels(), recipe.stages, strict=True)
            if isinstance(stage, Training) and not (is_cached and is_cached(label))
        )
    except InputError:  # told with the stages
        return False


def _judged_rows(sources: Sources) -> float:
    """Rows of the test split, or 1 where they aren't known."""
    text = sources.texts.get(f"split {TEST}")
    return float(text.rows if text else 1)


def plan_context(recipe: Recipe, sources: Sources, start: Shape | None, trial: Trial | None = None) -> PlanContext:
    """What stages may know when they predict their costs: what of the recipe is here, and what a trial showed."""
    texts = sources.texts
    answers = trial.answer_seconds / max(trial.start.working, 1.0) if trial else None
    return PlanContext(
        max_length=recipe.data.max_length,
        reads_text=all(column.kind == "text" for column in sources.task.columns),
        splits={split: texts[role] for split in recipe.data.splits if (role := f"split {split}") in texts},
        unlabeled={name: texts.get(f"unlabeled {name}") for name in recipe.data.unlabeled},
        find_model=sources.named_model,
        rate=functools.cache(lambda: machine_flops_per_second()),
        shapes={START: start},
        uses=trial.uses if trial else None,
        answer_seconds=answers,
        generates=GENERATES in sources.task.capabilities,
    )


def _disk_needed(stages: Sequence[StagePlan], sources: Sources) -> Estimate:
    """What stages that are not cached write, the final model once more for the run, and samples to fetch."""
    new = [stage for stage in stages if not stage.cached]
    written = [*(stage.disk_bytes for stage in new), *(stage.disk_bytes for stage in stages[-1:])]
    labels = [*(stage.label for stage in new), "the final copy"]
    total = _total(written, labels)
    fetched = sum(sources.downloads.values()) * UNPACKED
    if total.value is None:
        return Estimate(value=fetched or None, note=total.note)
    return Estimate(value=total.value + fetched, note=total.note)


def _total(estimates: Sequence[Estimate], labels: Sequence[str]) -> Estimate:
    known = [estimate.value for estimate in estimates if estimate.value is not None]
    unknown = [label for estimate, label in zip(estimates, labels, strict=False) if estimate.value is None]
    note = f"without {', '.join(unknown)}" if unknown else ""
    if not known:
        return Estimate.unknown(note)
    ends = [
        sum(value for estimate in estimates if (value := getattr(estimate, end) or estimate.value) is not None)
        for end in ("low", "high")
    ]
    return Estimate(value=sum(known), note=note, low=ends[0], high=ends[1])


def _free_bytes(artifacts: Path) -> int:
    place = artifacts.absolute()
    while not place.is_dir():
        place = place.parent
    return shutil.disk_usage(place).free


def _target_plan(profile: Profile, recipe: Recipe, start: Path | None, from_graph: bool) -> TargetPlan:
    target = profile.target
    reason = why_unavailable(target) or why_not(recipe, start, target, from_graph)
    about = [target.description, target.format, *limit_words(profile)]
    about += [f"measured here, not on {profile.instead_of}"] if profile.instead_of else []
    about += [f"timed on {profile.device}"] if profile.device else []
    return TargetPlan(name=target.name, available=reason is None, reason=reason or "; ".join(about))


def _missing_packages(recipe: Recipe) -> list[CompressError]:
    """One error for each package that a stage, or models of the task, call and that is not installed."""
    stages: tuple[Stage[Any, Any], ...] = recipe.stages
    users = {package: f"The stage {stage.kind}" for stage in reversed(stages) for package in stage.calls()}
    users |= dict.fromkeys(get_task(recipe.task).packages, f"The task {recipe.task}")
    errors: list[CompressError] = []
    for package, user in users.items():
        if has_package(package):
            continue
        if extra := extra_containing(package):
            errors.append(MissingExtraError(package, extra, user))
        else:
            what = f"{user} needs the package {package!r}, which is not installed."
            errors.append(InputError(what, hint=f"pip install {package}"))
    return errors


def _unfit(recipe: Recipe, sources: Sources) -> list[CompressError]:
    """One error for each stage that can't be applied to the starting model, of those before another model goes on.

    Of well-known types nothing is asked, since the answer takes the seconds in which torch is imported.
    """
    place = sources.start
    if place is None or not (place / "config.json").is_file():
        return []
    if read_json(place / "config.json").get("model_type") in PRUNING_TESTED_TYPES:
        return []
    quiet_libraries()
    errors: list[CompressError] = []
    for number, stage in enumerate(takewhile(lambda stage: not stage.paths(), recipe.stages)):
        try:
            stage.check_model(place)
        except CompressError as error:
            error.where = error.where or f"stages.{number}.{stage.kind}"
            errors.append(error)
    return errors


def _all(problems: Sequence[CompressError]) -> InputError:
    listed = "\n".join(str(problem) for problem in problems)
    if len(problems) == 1:
        return (
            problems[0] if isinstance(problems[0], InputError) else InputError(f"The recipe cannot run here: {listed}")
        )
    return InputError(f"The recipe cannot run here, for {len(problems)} reasons:\n{listed}")
