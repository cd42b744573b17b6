"""One whole run: the stages, the measurements, the report, and the folder that they end in."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import BaseModel

from compress import DISTRIBUTION
from compress.data.config import is_file_name
from compress.data.source import find
from compress.data.summary import summarize
from compress.data.vector_index import is_index_file
from compress.evaluation.loaded_model import LoadedModel
from compress.formats.quiet_output import quiet_libraries
from compress.pipeline.artifact import find_artifact
from compress.pipeline.licences import find_licences, refuse_forbidden, remarks_on
from compress.pipeline.measurements import Findings, data_record, measure, test_labels
from compress.pipeline.run_checks import check_artifacts, check_run
from compress.pipeline.runner import StageRunner
from compress.pipeline.size_warnings import measured_warnings
from compress.pipeline.target_limits import explained, target_limits
from compress.plugins import find_extensions, load_extension, plugin_problems
from compress.recipe.loading import dump_recipe, read_recipe
from compress.recipe.recipe import START, Recipe
from compress.report.console import console_table
from compress.report.limits import check_limits
from compress.report.notebook import report_table, terminal_text
from compress.report.pages import write_report
from compress.report.run_folder import (
    LATEST,
    LOCK,
    MODEL,
    RECIPE,
    TARGETS,
    create_run_folder,
    update_latest_link,
    write_atomically,
    write_predictions,
)
from compress.results.report import BASELINE, LimitResult, Report
from compress.utils.environment import package_versions
from compress.utils.errors import CompressError
from compress.utils.progress import Progress, SilentProgress, Total
from compress.utils.storage import digest_directory, storage_errors

Item = TypeVar("Item")
Model = TypeVar("Model", bound=BaseModel)
LOG = "run.log"


@dataclass(frozen=True)
class Run:
    """A finished run: its report, its folder and its recipe. ``announced``: notes on the data, shown at its start."""

    report: Report
    folder: Path
    recipe: Recipe = field(repr=False)
    announced: tuple[str, ...] = field(default=(), repr=False)

    def load(self, target: str | None = None, threads: int | None = None) -> LoadedModel:
        """Open the final model for predictions on raw inputs.

        Args:
            target: Target that runs the model; by default the first one of its format, which for ONNX is `cpu`.
            threads: Number of threads; by default all cores that this process may use.

        Raises:
            InputError: The target does not open the model.
        """
        return find_artifact(self.folder, None).open(target, threads)

    def _repr_html_(self) -> str:
        """Return the report's table for notebooks."""
        return report_table(self.report)

    def __str__(self) -> str:
        return terminal_text(console_table(self.report))


@dataclass(frozen=True)
class FinishedRun:
    """Argument of the functions that plug-ins register for `run_finished`: a run whose report is written.

    Attributes:
        recipe: Recipe with absolute paths, as it lies in the run's folder.
        report: Report of the run.
        lock: Seed, digests and versions, as in `lock.json`.
        folder: Folder of the run.
    """

    recipe: Recipe
    report: Report
    lock: Mapping[str, Any]
    folder: Path


def _notify_plugins(finished: FinishedRun, progress: Progress) -> None:
    """Call what plug-ins register for finished runs, such as the writer of the model card."""
    for extension in find_extensions("run_finished").values():
        write = load_extension(extension, lambda value: value)
        if write is not None:
            write(finished)
    # A plug-in that failed does not undo the run. The user gets a note.
    for problem in plugin_problems():
        if problem.point == "run_finished":
            progress.note(str(problem))


def take_part(recipe: Recipe, recipe_folder: Path, artifacts: Path) -> None:
    """Run the stages in a launched process other than the first one, which alone measures and reports."""
    quiet_libraries()
    StageRunner(recipe, recipe_folder, artifacts, SilentProgress()).run_all()


def run(recipe: Recipe, recipe_folder: Path, artifacts: Path, progress: Progress, remeasure: bool = False) -> Run:
    """Run the stages of a recipe, measure the outputs and write the report. Writes only below ``artifacts``.

    Args:
        recipe: The recipe.
        recipe_folder: The folder that relative paths in the recipe start from.
        artifacts: The folder of the cache and the runs.
        progress: Shows each step; the log of the run gets the same notes.
        remeasure: Take new timings even if the cache has some.

    Raises:
        CompressError: A failed or interrupted run leaves its log, and finished stages in the cache, but no report and
            no `latest`.
    """
    # A run without room on the disk ends before it makes a folder.
    check_artifacts(artifacts)
    quiet_libraries()
    began, started = time.perf_counter(), datetime.now(UTC).astimezone()
    with storage_errors(artifacts):
        folder = create_run_folder(artifacts / "runs" / recipe.name, started)
    with _logged(progress, folder / LOG) as logged:
        runner = StageRunner(recipe, recipe_folder, artifacts, logged)
        absolute = with_absolute_paths(recipe, recipe_folder)
        # The recipe is written first, so that even a failed run can be repeated from its folder.
        write_atomically(folder / RECIPE, dump_recipe(absolute))
        # A forbidden licence ends the run before any computation.
        licences = find_licences(recipe, recipe_folder, fetch=True)
        refuse_forbidden(licences, recipe)
        check_run(runner)
        for note in (*map(str, plugin_problems()), *notes_on_other_recipe(absolute, folder.parent)):
            logged.note(note)
        summary = summarize(runner.inputs.data, runner.inputs.start / "tokenizer.json", recipe.data.max_length)
        facts = () if summary is None else (*summary.lines(), *summary.warnings())
        for line in facts:
            logged.note(line)
        runner.run_all()
        # Everything is measured on the files that the stages wrote, through the runtime of each target.
        findings = measure(runner, remeasure)
        findings.notes[:0] = map(str, plugin_problems())
        if summary is not None:
            rows = (row for row in findings.measurements if (row.model, row.metric) == (BASELINE, "accuracy"))
            findings.notes += [*summary.lines(), *summary.warnings([row.value for row in rows])]
        findings.notes += [*runner.inputs.data.notes, *remarks_on(licences, recipe)]
        final = runner.folder_of(recipe.labels()[-1])
        findings.notes += measured_warnings(recipe, runner.inputs.given, final, findings.finals)
        _copy_models(runner, findings.finals, folder)
        lock = _write_lock(runner, folder)
        results = [runner.results[label] for label in recipe.labels()]
        report = Report(
            recipe=recipe.name,
            task=recipe.task,
            description=recipe.description,
            started=started.isoformat(timespec="seconds"),
            seconds=time.perf_counter() - began,
            baseline=recipe.baseline,
            stages=tuple(result.record for result in results),
            integrity=tuple(check for result in results for check in result.integrity),
            limits=_judge_limits(recipe, findings),
            data=data_record(runner),
            licences=licences,
            **findings.report_fields(),
        )
        _write_answers(runner, findings, folder)
        write_report(report, folder)
        _notify_plugins(FinishedRun(absolute, report, lock, folder), logged)
        with storage_errors(folder.parent):
            # The link moves last: `latest` always names a complete run.
            update_latest_link(folder)
    return Run(report, folder, recipe, (*facts, *runner.inputs.data.notes))


def notes_on_other_recipe(recipe: Recipe, runs: Path) -> tuple[str, ...]:
    """Return a note if the latest run of the same name used another model or other data."""
    try:
        latest = read_recipe(runs / LATEST / RECIPE)
    except CompressError:  # there is none, or an older compress wrote it
        return ()
    if (latest.model, latest.data.source, latest.data.splits) == (recipe.model, recipe.data.source, recipe.data.splits):
        return ()
    name = recipe.name
    return (
        f"the latest run named {name} used another model or other data ({latest.model}); runs of both recipes lie in "
        f"{runs}, and `{name}` now refers to this one. Another `name` in one of the recipes keeps them apart",
    )


def with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with absolute paths of local files, so that it can run again from any folder."""

    def absolute(reference: str) -> str:
        path = find(reference, folder)
        return reference if path is None else str(path.resolve())

    data = recipe.data
    source = data.source and absolute(data.source)
    # Splits may be named relative to the data's folder, or to the recipe.
    home = Path(source) if source and Path(source).is_dir() else folder
    splits = {
        split: absolute(str(home / name) if (home / name).is_file() else name) if is_file_name(name) else name
        for split, name in data.splits.items()
    }
    changes = {"source": source, "splits": splits, "unlabeled": tuple(absolute(name) for name in data.unlabeled)}
    stages = []
    for stage in recipe.stages:
        for path, reference in stage.references().items():
            stage = _with_field(stage, path.split("."), absolute(reference.name))
        stages.append(stage)
    # Evaluation files that the recipe names besides its data.
    names = ("questions", "similarity", "instructions", "judge")
    files = {name: absolute(path) for name in names if (path := getattr(recipe.evaluation, name))}
    if is_index_file(recipe.evaluation.index):
        files["index"] = absolute(recipe.evaluation.index)
    licences = {
        field: {absolute(name): value for name, value in getattr(recipe.licences, field).items()}
        for field in ("stated", "allowed")
    }
    update = {
        "licences": recipe.licences.model_copy(update=licences),
        "data": data.model_copy(update=changes),
        "model": absolute(recipe.model),
        "stages": tuple(stages),
        "evaluation": recipe.evaluation.model_copy(update=files),
    }
    return recipe.model_copy(update=update)


def _with_field(model: Model, field: Sequence[str], value: str) -> Model:
    """Return a copy of a pydantic model with another value in a field, which may be nested."""
    name, *rest = field
    return model.model_copy(update={name: _with_field(getattr(model, name), rest, value) if rest else value})


def _judge_limits(recipe: Recipe, findings: Findings) -> tuple[LimitResult, ...]:
    """Return the results of the recipe's limits, and of those that its targets have on shipped bytes and memory."""
    limits = (*recipe.limits, *target_limits(recipe.profiles(), findings.measurements))
    results = check_limits(
        *(limits, findings.measurements, recipe.baseline, findings.skipped),
        machines=findings.machines,
        verdicts=recipe.verdicts,
    )
    return tuple(explained(result, recipe.profiles(), findings.finals, findings.shipped) for result in results)


def _copy_models(runner: StageRunner, finals: Mapping[str, Path], folder: Path) -> None:
    """Copy the final model out of the cache, which `compress cache prune` may empty, into the run's folder.

    ``finals`` are the final model's files by target. Those that no stage of the recipe wrote are copied too.
    """
    labels = runner.recipe.labels()
    outputs = {runner.folder_of(label) for label in (START, *labels)}
    with storage_errors(folder):
        _copy_model(runner.folder_of(labels[-1]), folder / MODEL)
        for name, source in finals.items():
            if source not in outputs:
                _copy_model(source, folder / TARGETS / name)


def _copy_model(source: Path, folder: Path) -> None:
    folder.parent.mkdir(exist_ok=True)
    # Copy under another name first, so that an interrupted copy is never taken for a model.
    partial = folder.with_name(f".{folder.name}")
    shutil.copytree(source, partial)
    partial.rename(folder)


def _write_answers(runner: StageRunner, findings: Findings, folder: Path) -> None:
    """Write the models' answers to the test rows, if they are kept. Several targets have a column of answers each."""
    if findings.answers:
        several = len({target for _, target in findings.answers}) > 1
        write_predictions(test_labels(runner), findings.answers, folder, several)


def _write_lock(runner: StageRunner, folder: Path) -> dict[str, object]:
    """Write and return what reproduces the same bytes: seed, digests, package versions and threads."""
    import torch

    packages = sorted({name for stage in runner.recipe.stages for name in stage.called_packages()})
    splits = runner.inputs.data.splits
    lock = {
        "seed": runner.recipe.seed,
        "threads": torch.get_num_threads(),
        "packages": package_versions((DISTRIBUTION, *packages)),
        "data": {split: runner.inputs.data.digest(split) for split in splits},
        START: digest_directory(runner.inputs.start),
        "stages": {label: finished.entry.digest for label, finished in runner.results.items()},
    }
    write_atomically(folder / LOCK, json.dumps(lock, indent=2) + "\n")
    return lock


@dataclass(frozen=True)
class _LoggedProgress:
    """Progress that also writes each note, with its time, into a log file."""

    inner: Progress
    log: BinaryIO

    def track(self, items: Iterable[Item], description: str, total: Total) -> Iterator[Item]:
        """Yield ``items`` through the inner progress."""
        self.write(description if callable(total) else f"{description} ({total} steps)")
        yield from self.inner.track(items, description, total)

    def note(self, message: str) -> None:
        """Show one line and log it."""
        self.write(message)
        self.inner.note(message)

    def detail(self, message: str) -> None:
        """Log one line, which the inner progress may show."""
        self.write(message)
        self.inner.detail(message)

    def write(self, message: str) -> None:
        """Log one line without showing it."""
        line = f"{datetime.now(UTC).astimezone().isoformat(timespec='milliseconds')} {message}\n"
        self.log.write(line.encode())


@contextlib.contextmanager
def _logged(progress: Progress, path: Path) -> Iterator[_LoggedProgress]:
    """Yield a progress that logs into ``path``. An error that ends the run is logged with its traceback."""
    # Unbuffered, so that closing the file cannot fail a second time on a full disk.
    with storage_errors(path), path.open("ab", buffering=0) as log:
        logged = _LoggedProgress(progress, log)
        try:
            yield logged
        except (CompressError, KeyboardInterrupt) as error:
            ending = "interrupted" if isinstance(error, KeyboardInterrupt) else traceback.format_exc()
            # The error may be a full disk, which the user is told once.
            with contextlib.suppress(OSError):
                logged.write(ending)
            raise
