"""Checks of a recipe against its model, data and disk, made before the first stage runs."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pyarrow import Table

from compress.data.dataset import Dataset
from compress.data.membership import character_lengths, find_parts
from compress.data.slices import Unit
from compress.evaluation.evaluate import encode_for_model
from compress.evaluation.generate import encode_chats
from compress.models import PRUNING_TESTED_TYPES
from compress.models.config_checks import max_positions
from compress.models.json_file import read_json
from compress.models.lora_adapter import check_adapter
from compress.models.pipeline_folder import image_generation_hook
from compress.models.processor import load_processor
from compress.pipeline.formats import check_formats
from compress.pipeline.index_evaluation import check_starting_index
from compress.pipeline.keys import cached_digests
from compress.pipeline.runner import StageRunner
from compress.pipeline.target_session import SPLIT
from compress.recipe.limit_checks import (
    changed_rows_share,
    decidable_bound,
    is_share_of_rows,
    ratio_half_width,
    rows_to_decide,
    tightest_bound,
)
from compress.recipe.recipe import START, Recipe
from compress.stages.base import all_references
from compress.stages.protocols import ChecksData, model_checks
from compress.tasks.capability import READS_ROWS
from compress.tasks.registry import TASKS
from compress.tasks.task import Examples, Task
from compress.utils.environment import extra_containing, has_package
from compress.utils.errors import CompressError, DataError, InputError, MissingExtraError

_RUN_FILES_BYTES = 1_000_000
"""Bytes of a run's log and report."""


def missing_packages(recipe: Recipe) -> list[CompressError]:
    """Return one error for each package that a stage or the task needs and that is not installed."""
    users = {
        package: f"The stage {stage.kind}" for stage in reversed(recipe.stages) for package in stage.called_packages()
    }
    users |= dict.fromkeys(TASKS[recipe.task].packages, f"The task {recipe.task}")
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


def check_artifacts(artifacts: Path) -> None:
    """Raise `InputError` if the artifacts folder is a file, or its disk has no room for a run's own files."""
    if artifacts.exists() and not artifacts.is_dir():
        raise InputError("The artifacts folder is a file.", where=str(artifacts), expected="a folder")
    if not os.access(_nearest_folder(artifacts), os.W_OK):
        raise InputError(
            "The artifacts folder cannot be written.",
            where=str(artifacts),
            hint="name another folder with --artifacts, or give yourself the right to write there",
        )
    free = free_bytes(artifacts)
    if free < _RUN_FILES_BYTES:
        raise disk_error(_RUN_FILES_BYTES, free, artifacts)


def free_bytes(artifacts: Path) -> int:
    """Return the free bytes of the disk on which the artifacts folder is, or will be."""
    return shutil.disk_usage(_nearest_folder(artifacts)).free


def _nearest_folder(path: Path) -> Path:
    """Return the folder, or its nearest existing parent, which lies on the same disk."""
    folder = path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def disk_error(needed_bytes: float, free_bytes: int, artifacts: Path) -> InputError:
    """Return the error of a run whose outputs do not fit on the disk of the artifacts folder."""
    return InputError(
        f"The run needs about {needed_bytes / 1e9:.2f} GB of disk, and {free_bytes / 1e9:.2f} GB are free.",
        where=str(artifacts),
        hint="Free some space (`compress cache prune`), or give --artifacts on another disk.",
    )


def combined_error(problems: Sequence[CompressError]) -> InputError:
    """Return one error that lists all distinct problems, or the problem itself if it is the only one."""
    # One file may be named for several splits.
    problems = list({str(problem): problem for problem in problems}.values())
    if len(problems) > 1:
        count = sum(len(problem.problem_records()) for problem in problems)
        error = InputError(f"The recipe cannot run here, for {count} reasons:")
        error.errors = tuple(problems)
        return error
    problem = problems[0]
    return problem if isinstance(problem, InputError) else InputError(f"The recipe cannot run here: {problem}")


def untestable_limits(recipe: Recipe, task: Task, data: Dataset) -> list[CompressError]:
    """Return an error for each limit on a share of right rows that a single row of the test split decides.

    Args:
        recipe: The recipe.
        task: Its task.
        data: Its data. Without a test split, limits are not checked.
    """
    rows = len(data.tables.get(SPLIT, ()))
    if not rows or READS_ROWS not in task.capabilities:
        return []
    errors: list[CompressError] = []
    for index, limit in enumerate(recipe.limits):
        if not is_share_of_rows(limit.metric) or limit.at_least is None or limit.at_least >= 1:
            continue
        # Rounding must not make a limit of exactly one row look tighter.
        least_rows = math.ceil(1 / (1 - limit.at_least) - 1e-6)
        if rows < least_rows:
            bound = f"at least {limit.at_least:g}{f' of {limit.of}' if limit.of else ''}"
            error = InputError(
                f"The limit {limit.metric} {bound} cannot be tested with {rows:,} test rows: one changed row decides.",
                where=f"limits.{index}.at_least",
                expected=f"at least {least_rows:,} test rows, or a bound of at most {tightest_bound(rows):g}",
                hint="add test rows or lower the bound; a bound of 1 means that no row may get worse",
            )
            errors.append(error)
    return errors


def undecided_limits(recipe: Recipe, task: Task, data: Dataset) -> list[str]:
    """Return a warning for each limit on a ratio of shares of right rows that the test split will hardly decide.

    Bounds that a single row decides are errors of `untestable_limits`. An absolute bound depends on the value.
    """
    rows = len(data.tables.get(SPLIT, ()))
    if not rows or READS_ROWS not in task.capabilities:
        return []
    labels = (START, *recipe.labels())
    warnings = []
    for limit in recipe.limits:
        bound = limit.at_least
        if limit.of is None or bound is None or bound >= 1 or not is_share_of_rows(limit.metric):
            continue
        # Only the stages after the model that the limit refers to can change its answers.
        first = labels.index(limit.of if limit.of in labels else recipe.baseline)
        changed = changed_rows_share([type(stage) for stage in recipe.stages[first:]])
        if (half_width := ratio_half_width(rows, changed)) > 1 - bound:
            warnings.append(
                f"{limit.metric} on {limit.target} at least {bound:g} of {limit.of}: with {rows:,} test rows the "
                f"interval of the ratio is about \u00b1{half_width:.1%}, so this limit will probably be inconclusive; "
                f"it needs about {rows_to_decide(bound, changed):,} test rows, or a bound of about "
                f"{decidable_bound(rows, changed):g}"
            )
    return warnings


def check_run(runner: StageRunner) -> None:
    """Check everything that can be checked before the first stage, so that no error comes after hours of training.

    Raises:
        CompressError: With what is wrong and where.
    """
    inputs = runner.inputs
    problems = missing_packages(runner.recipe) or untestable_limits(runner.recipe, inputs.task, inputs.data)
    if problems:
        raise combined_error(problems)
    # Data first: these checks read files, but no model. The task's own slices fit its columns.
    if runner.recipe.slices is not None:
        check_slices(runner)
    # The judge of images must know the classes of the rows.
    if runner.recipe.evaluation.judge is not None:
        rows = inputs.data.split(SPLIT)
        labels = rows["label"].to_pylist() if "label" in rows.column_names else ()
        image_generation_hook("check_judge")(inputs.judge, labels)
    for reference in dict.fromkeys(all_references(runner.recipe.stages)):
        if reference.kind == "model":
            inputs.resolve(reference.name)
        else:
            folder = inputs.locate(reference.name)
            if reference.kind == "adapter":
                check_adapter(folder)
    # Then the tokenizer and the model's architecture.
    if READS_ROWS not in inputs.task.capabilities:
        check_running_text(runner)
    check_formats(runner.recipe, inputs.start)
    _check_disk_space(runner)
    # Models of types that all stages are tested with need no dry run of the first stage: it starts right away.
    config = inputs.start / "config.json"
    tested = config.is_file() and read_json(config).get("model_type") in PRUNING_TESTED_TYPES
    checks = model_checks(runner.recipe.stages)
    for check in [check for check in checks if not tested or check.stages != runner.recipe.stages[:1]]:
        check.run(inputs.start)
    # Evaluation files are read now, so that a damaged one ends the run here.
    evaluation = runner.recipe.evaluation
    notes = (
        (evaluation.questions and len(inputs.questions), "multiple-choice questions are asked"),
        (evaluation.instructions and len(inputs.instructions), "instructions are given, whose answers are checked"),
        (
            evaluation.similarity and sum(len(part.scores) for part in inputs.rated_pairs),
            "pairs with human similarities are read",
        ),
        (inputs.vector_index and len(inputs.vector_index.texts), "documents of the index are searched"),
    )
    for text in [f"{count:,} {text}" for count, text in notes if count]:
        runner.progress.note(text)
    check_starting_index(inputs)


def _check_disk_space(runner: StageRunner) -> None:
    """Raise `InputError` if the outputs of stages that are not cached, and the final copy, do not fit on the disk.

    A stage without a declared size ratio is assumed to keep the size of its input.
    """
    sizes, output_bytes = dict[str, float](), float(runner.model_bytes(START))
    for label, stage in zip(runner.recipe.labels(), runner.recipe.stages, strict=True):
        ratio = stage.output_spec().max_size_ratio
        output_bytes *= 1.0 if ratio is None else min(ratio, 1.0)
        sizes[label] = output_bytes
    free = free_bytes(runner.artifacts)
    # The final model is copied once more, into the run's folder.
    if sum(sizes.values()) + output_bytes <= free:
        return
    cached = cached_digests(runner.recipe, runner.keys, runner.cache)
    needed = sum(size for label, size in sizes.items() if label not in cached) + output_bytes
    if needed > free:
        raise disk_error(needed, free, runner.artifacts)


def check_slices(runner: StageRunner) -> None:
    """Check that the recipe's slices can be formed from the test split. Raises `DataError`."""
    task, slices, data = runner.inputs.task, runner.inputs.slices, runner.inputs.data
    if READS_ROWS not in task.capabilities and any(part.length is not None for part in slices):
        raise DataError(
            f"There are no slices by length of running text, which {task.name} is judged on.",
            where="slices",
            expected="slices by a column of its rows, such as their domain",
        )

    def lengths(unit: Unit) -> np.ndarray:
        """Count characters; before there is a tokenizer every row counts one token."""
        return character_lengths(data, SPLIT) if unit == "characters" else np.ones(len(data.split(SPLIT)))

    find_parts(slices, data, SPLIT, lengths)


def check_running_text(runner: StageRunner) -> None:
    """Split all running text with the starting model's tokenizer, to check lengths before any stage runs.

    Raises `DataError`.
    """
    recipe, inputs = runner.recipe, runner.inputs
    for number, stage in enumerate(recipe.stages):
        if not isinstance(stage, ChecksData):
            continue
        try:
            stage.check_data(inputs.start, runner.context(runner.digest_of(START)))
        except DataError as error:
            error.where = f"stages.{number}.{stage.kind}, {error.where}"
            raise

    def encode(rows: Table) -> Examples:
        return encode_for_model(inputs.start, inputs.task, rows, recipe.data.max_length, recipe.evaluation)

    processor = load_processor(inputs.start)
    # Texts in other languages are split into categories of tokens, which fails for unknown languages.
    for split, language in recipe.data.also.items():
        rows = inputs.data.split(split)
        inputs.task.token_categories(rows, processor, encode(rows), language)
    # Prompts of chats, with the model's own template around them.
    prompts = [instruction.prompt for instruction in inputs.instructions]
    turns = encode_chats(inputs.start, prompts) if prompts else []
    examples = encode(inputs.data.split(SPLIT))
    num_tokens, prompt_length = int(examples.lengths().sum()), max(recipe.benchmark.contexts)
    if prompt_length > num_tokens:
        raise DataError(
            f"A prompt of {prompt_length} tokens is to be timed, and the evaluation text has {num_tokens}.",
            where="benchmark.contexts",
            hint="give more text, raise evaluation.windows, or lower benchmark.contexts",
        )
    # A model with learned positions cannot read beyond them. Each setting that makes a text longer is compared.
    positions = max_positions(read_json(inputs.start / "config.json"))
    lengths = {
        "data.max_length": recipe.data.max_length,
        "benchmark.contexts": prompt_length + recipe.benchmark.tokens,
        "evaluation.answer_tokens": max(map(len, turns), default=0) + recipe.evaluation.answer_tokens * bool(turns),
        "evaluation.tokens": recipe.evaluation.prompt_tokens + recipe.evaluation.tokens,
    }
    for field, length in lengths.items():
        if positions is not None and length > positions:
            raise DataError(
                f"The model would receive {length} tokens, more than it has positions for.",
                where=field,
                expected=f"at most {positions}, its max_position_embeddings, with what is generated after a prompt",
            )
