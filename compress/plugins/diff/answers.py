"""What two models answer to the same inputs: rows of a file, or inputs that are drawn, each through its own runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from compress.data.dataset import TEST, load_dataset
from compress.data.membership import Part, character_lengths, find_parts
from compress.data.slices import Slice
from compress.evaluation.evaluate import Predictions, artifact_labels, encode_for_model, predict, task_slice_rows
from compress.formats.model_file import format_of
from compress.formats.runtime import Session, get_runtime, why_unavailable
from compress.formats.target_profile import Target
from compress.formats.targets import PROFILES
from compress.inspection.tensors import read_model
from compress.numerics.calibration import mean_interval
from compress.numerics.token_metrics import divergence
from compress.plugins.diff.record import AnswersDiff
from compress.recipe.policy import Policy, comparison_policy
from compress.recipe.recipe import Recipe
from compress.report.compare.change import Comparison
from compress.report.compare.flips import input_texts, shorten
from compress.report.compare.reports import compare_reports
from compress.report.predictions import ModelAnswers, write_predictions
from compress.results.formatting import format_bytes
from compress.results.measurement import Measurement
from compress.results.metrics import describe_metric
from compress.results.report import BASELINE, FINAL, DataRecord, Report, SliceRecord
from compress.tasks.capability import READS_ROWS
from compress.tasks.classes import mean_row
from compress.tasks.task import Task
from compress.utils.errors import CompressError, InputError, ModelError
from compress.utils.progress import Progress

HERE = "here"
"""In place of a target: each of both runs where its own format does."""
_SEED = 0
_QUARTILES = (Slice(length="quartiles"),)
Batches = Sequence[Mapping[str, np.ndarray]]


def target_of(artifact: Path) -> Target:
    """The first that opens the format of ``artifact`` here. Raises `InputError` where none does."""
    form, reasons = format_of(artifact), []
    for profile in PROFILES.values():
        if profile.target.format == form:
            reason = why_unavailable(profile.target)
            if reason is None:
                return profile.target
            reasons.append(f"{profile.name}: {reason}")
    raise InputError(
        f"Nothing here runs files of the format {form}.", where=str(artifact), expected="; ".join(reasons[:3]) or None
    )


def on_rows(before: Path, after: Path, recipe: Recipe, folder: Path, task: Task, progress: Progress) -> AnswersDiff:
    """Both on the test split of ``recipe``, whose relative paths count from ``folder``.

    Raises what reading the data and running the models raise.
    """
    data = load_dataset(recipe.data, task.columns, folder, progress)
    rows, length = data.split(TEST), recipe.data.max_length
    artifacts = {BASELINE: before, FINAL: after}
    found: dict[str, Predictions] = {}
    examples = {}
    for label, artifact in artifacts.items():
        beside = None if label == BASELINE else before
        examples[label] = encode_for_model(artifact, task, rows, length, recipe.evaluation, beside)
        target, text = target_of(artifact), f"ask {artifact.name or artifact}"
        found[label] = predict(artifact, task, examples[label], target, 1, progress, text)

    def lengths(unit: str) -> np.ndarray:
        return character_lengths(data, TEST) if unit == "characters" else examples[BASELINE].lengths()[: len(rows)]

    parts: list[Part] = []
    with suppress(CompressError):  # rows without a length, such as images
        parts = find_parts(recipe.slices or task.slices or _QUARTILES, data, TEST, lengths)[0]
    if READS_ROWS not in task.capabilities:
        parts = [replace(part, rows=task.members(rows, part.rows, examples[BASELINE])) for part in parts]
    parts = [part for part in parts if part.rows.any()]
    measured: list[Measurement] = []
    for label, own in found.items():
        whole = task.measure(own.kept, own.labels, label, HERE)
        measured += [*whole, *task_slice_rows(task, own, whole, parts)]
    near = [*task.compare(found[FINAL].kept, found[BASELINE].kept, FINAL, HERE), *_apart(task, found)]
    record = DataRecord(split=TEST, digest=data.digest(TEST), rows=len(rows), labels=data.labels)
    report = Report(
        recipe=recipe.name,
        data=record,
        measurements=(*measured, *near),
        slices={part.name: SliceRecord.of(part.rows.tolist(), part.about) for part in parts},
    )
    answers = {label: _answers(task, artifacts[label], found[label], data.labels) for label in found}
    ids = found[BASELINE].labels
    names = [data.labels[place] for place in ids] if data.labels and ids is not None else []
    comparison = _compared(report, answers, names, input_texts(data, TEST))
    return AnswersDiff(inputs=f"{len(rows):,} rows", rows=tuple(near), comparison=comparison)


def _apart(task: Task, found: Mapping[str, Predictions]) -> list[Measurement]:
    """The divergence of classes' probabilities, which tasks with classes don't tell."""
    old, new = (task.probabilities(found[label].kept) for label in (BASELINE, FINAL))
    if old is None or new is None or old.shape != new.shape:
        return []
    with np.errstate(divide="ignore"):
        values = divergence(np.log(old), np.log(new))
    sure = mean_row("confidence_change", new.max(axis=-1) - old.max(axis=-1), FINAL, HERE)
    return [mean_of("kl_divergence", values, "nats"), sure.model_copy(update={"raw": None})]


def _answers(task: Task, artifact: Path, found: Predictions, labels: Sequence[str]) -> ModelAnswers | None:
    chances = task.probabilities(found.kept)
    if chances is None:
        return None
    names, chosen = artifact_labels(artifact) or labels, chances.argmax(axis=-1)
    return ModelAnswers([names[place] for place in chosen], chances.max(axis=-1), chosen == found.labels)


def _compared(
    report: Report, answers: Mapping[str, ModelAnswers | None], labels: Sequence[str], texts: Sequence[str]
) -> Comparison | None:
    """The two of one report, with examples of what flipped; None where nothing was measured of both."""
    with tempfile.TemporaryDirectory(prefix="compress-diff-") as scratch:
        folder = Path(scratch)
        known = {(label, HERE): one for label, one in answers.items() if one is not None}
        if known and labels:
            write_predictions(labels, known, folder, several=False)
        try:
            policy = comparison_policy().model_copy(update={"model": FINAL})
            found = beside(report, report, policy, (folder, folder), BASELINE)
        except InputError:
            return None
    flips = tuple(one.model_copy(update={"example": shorten(texts[one.row])}) for one in found.flips)
    return found.model_copy(update={"flips": flips})


def beside(
    before: Report,
    after: Report,
    policy: Policy,
    folders: tuple[Path | None, Path | None],
    baseline_model: str | None = None,
) -> Comparison:
    """Two reports compared without what only a clock or a scale says."""
    reports = [
        one.model_copy(update={"measurements": tuple(row for row in one.measurements if not _weighed(row))})
        for one in ((before,) if before is after else (before, after))
    ]
    return compare_reports(
        reports[0], reports[-1], policy, names=("A", "B"), baseline_model=baseline_model, folders=folders
    )


def _weighed(row: Measurement) -> bool:
    known = describe_metric(row.metric, row.unit)
    return known.timed or known.style in ("bytes", "count") or row.model == "machine"


def opened(artifact: Path) -> Session:
    """``artifact`` where its format runs. Raises what opening raises."""
    target = target_of(artifact)
    return get_runtime(target.runtime).open(artifact, target, 1)


def mean_of(metric: str, samples: np.ndarray, unit: str) -> Measurement:
    """The mean of samples of the second model beside the first, with its bootstrap interval."""
    value, low, high = mean_interval(samples, _SEED)
    return Measurement(
        model=FINAL, metric=metric, target=HERE, value=value, unit=unit, low=low, high=high, n=len(samples)
    )


def check_memory(artifacts: Sequence[Path]) -> None:
    """Raise `InputError` where there is no room for the models, which are open side by side, in float32."""
    import psutil

    needed = sum(4 * one.parameters for artifact in artifacts for one in read_model(artifact).tensors)
    free = psutil.virtual_memory().available
    if needed > free:
        raise InputError(
            f"Both models take {format_bytes(needed)} of memory, and {format_bytes(free)} are free.",
            hint="--depth weights reads them tensor by tensor",
        )


def check_config_there(folder: Path) -> None:
    """Raise `ModelError` where nothing says how a model is asked."""
    if not (folder / "config.json").is_file():
        raise ModelError("There is no config.json beside the weights.", where=str(folder))
