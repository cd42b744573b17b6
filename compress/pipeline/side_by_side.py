"""Two finished artifacts, measured now in one session: on the same rows, in the same runtime, taking turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from compress.bench.session import PRECISION
from compress.data.dataset import Dataset
from compress.data.membership import Part, character_lengths, find_parts
from compress.data.questions import Question
from compress.data.slices import Unit
from compress.evaluation.choices import choice_rows, choice_scores
from compress.evaluation.evaluate import Predictions, encode_for, predict, slices_of_task
from compress.evaluation.generate import continue_prompts, prompts_of, repetition_row
from compress.measurement import Measurement
from compress.pipeline.target_session import SPLIT, answers_of, size_rows
from compress.pipeline.timing import time_artifacts
from compress.progress import Progress
from compress.recipe.recipe import Recipe
from compress.report.predictions import write_predictions
from compress.report.schema import BASELINE, FINAL, DataRecord, Report, SliceRecord
from compress.targets import Target
from compress.tasks.capability import GENERATES
from compress.tasks.registry import get_task
from compress.tasks.task import Examples, Task


def measure_side_by_side(
    baseline: Path,
    candidate: Path,
    recipe: Recipe,
    data: Dataset,
    target: Target,
    progress: Progress,
    precision: float = PRECISION,
    confidence: float = 0.95,
    answers: Path | None = None,
    questions: Sequence[Question] = (),
) -> Report:
    """Evaluate and time two artifacts together, as the models `baseline` and `final` of one report.

    ``recipe`` gives the task, the slices, the benchmark's settings and the seed; see `measure_together` for
    ``precision`` and ``confidence``. A language model is asked the ``questions`` too. Into the folder ``answers``, if
    there is one, goes what both answered. Raises what evaluating and timing raise.
    """
    task, started = get_task(recipe.task), datetime.now(UTC).astimezone()
    folders = {BASELINE: baseline, FINAL: candidate}
    rows = data.split(SPLIT)
    examples = {
        label: encode_for(folder, task, rows, recipe.data.max_length, recipe.evaluation)
        for label, folder in folders.items()
    }
    parts, notes = _parts(recipe, data, examples[BASELINE])
    notes += [examples[BASELINE].note] if examples[BASELINE].note else []
    found: dict[str, Predictions] = {}
    measured: list[Measurement] = []
    for label, folder in folders.items():
        what = f"evaluate the {'candidate' if label == FINAL else label} on {target.name}"
        found[label] = predict(folder, task, examples[label], target, recipe.benchmark.threads, progress, what)
        own = task.measure(found[label].kept, found[label].labels, label, target.name)
        measured += [*size_rows(folder, label, target), *own, *slices_of_task(task, found[label], own, parts)]
        measured += task.compare(found[label].kept, found[BASELINE].kept, label, target.name)
        if GENERATES in task.capabilities:
            measured += _writing(folder, label, examples[label], recipe, questions, target, progress)
    timed = time_artifacts(
        task,
        folders,
        examples,
        target,
        recipe.benchmark,
        BASELINE,
        progress,
        recipe.seed,
        precision=precision,
        confidence=confidence,
    )
    if answers is not None:
        _write_answers(task, folders, data, target, found, answers)
    return Report(
        recipe=recipe.name,
        started=started.isoformat(timespec="seconds"),
        environment=timed.environment,
        measurements=(*measured, *timed.measurements),
        notes=(*notes, *timed.notes),
        data=DataRecord(split=SPLIT, digest=data.digest(SPLIT), rows=len(rows), labels=data.labels),
        slices=_records(parts),
    )


def _write_answers(
    task: Task,
    folders: Mapping[str, Path],
    data: Dataset,
    target: Target,
    found: Mapping[str, Predictions],
    place: Path,
) -> None:
    """Into the folder ``place``, of tasks whose answers are kept."""
    given = {
        (label, target.name): told
        for label, folder in folders.items()
        if (told := answers_of(task, folder, data.labels, found[label])) is not None
    }
    if given:
        labels = [data.labels[index] for index in data.label_ids(SPLIT)]
        write_predictions(labels, given, place, several=False)


def _writing(
    folder: Path,
    label: str,
    examples: Examples,
    recipe: Recipe,
    questions: Sequence[Question],
    target: Target,
    progress: Progress,
) -> list[Measurement]:
    """What a model answers to ``questions``, and how much it repeats itself after the recipe's prompts."""
    wanted, threads, rows = recipe.evaluation, recipe.benchmark.threads, list[Measurement]()
    if questions:
        scores = choice_scores(folder, questions, target, threads, progress, f"choices of {label} on {target.name}")
        rows += choice_rows(questions, scores, label, target.name)
    if wanted.prompts:
        prompts, what = prompts_of(examples, wanted), f"continue texts with {label} on {target.name}"
        texts = continue_prompts(folder, prompts, wanted.tokens, target, threads, progress, what)
        rows.append(repetition_row(texts, label, target.name))
    return rows


def _parts(recipe: Recipe, data: Dataset, examples: Examples) -> tuple[list[Part], list[str]]:
    """The slices of the test split; tokens are those of the baseline's tokenizer."""
    slices = get_task(recipe.task).slices if recipe.slices is None else recipe.slices

    def lengths(unit: Unit) -> np.ndarray:
        return character_lengths(data, SPLIT) if unit == "characters" else examples.lengths()[: len(data.split(SPLIT))]

    return find_parts(slices, data, SPLIT, lengths)


def _records(parts: list[Part]) -> dict[str, SliceRecord]:
    return {part.name: SliceRecord.of(part.rows.tolist(), part.about) for part in parts}
