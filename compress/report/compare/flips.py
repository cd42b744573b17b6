"""Test examples that one model gets right and the other wrong, with both answers.

Their texts come from the data of the run's recipe if it is still on this machine. Nothing is downloaded for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from compress.data.dataset import Dataset, load_dataset
from compress.data.media import shown
from compress.data.samples.fetch import cached_directory
from compress.data.source import HubSplit, locate_split
from compress.recipe.loading import read_recipe
from compress.report.compare.change import ComparedModels, Flip
from compress.report.run_folder import RECIPE, StoredPredictions, read_predictions
from compress.results.report import Report
from compress.tasks.registry import TASKS
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import SilentProgress

_LONGEST = 400


def find_flips(
    sides: ComparedModels, target: str, metric: str = "accuracy", most: int | None = None
) -> tuple[Flip, ...]:
    """Return examples that became wrong, then examples that became right, the most confident answers first.

    Answers come from `predictions.parquet` in the runs' folders. Texts come from the data of a folder's `recipe.yaml`,
    if its test rows still equal those of the report. An unavailable answer or label is empty, and ``example`` then says
    where the row is and why its text is missing. Nothing is returned if the outcomes of the two don't pair.

    Args:
        sides: Compared models.
        target: Target of the measurements.
        metric: Metric of which outcomes count.
        most: Largest number of examples of either kind.
    """
    raw = sides.outcomes(metric, target)
    if raw is None:
        return ()
    baseline = _answers(sides.baseline_folder, sides.baseline_model, target, raw[0])
    candidate = _answers(sides.candidate_folder, sides.candidate_model, target, raw[1])
    pairs = list(enumerate(zip(*raw, strict=True)))
    wrong = [row for row, (was_right, is_right) in pairs if was_right > is_right]
    right = [row for row, (was_right, is_right) in pairs if was_right < is_right]
    if candidate is not None:
        confidence = candidate.answers.probability
        wrong, right = (sorted(rows, key=lambda row: -confidence[row]) for rows in (wrong, right))
    chosen = [*wrong[:most], *right[:most]]
    if not chosen:
        return ()
    predictions = candidate or baseline
    text = examples_of(((sides.candidate, sides.candidate_folder), (sides.baseline, sides.baseline_folder)))
    return tuple(
        Flip(
            row=row,
            now="wrong" if raw[0][row] > raw[1][row] else "right",
            label=predictions.labels[row] if predictions else "",
            baseline_answer=baseline.answers.answers[row] if baseline else "",
            candidate_answer=candidate.answers.answers[row] if candidate else "",
            example=text(row),
        )
        for row in chosen
    )


def _answers(folder: Path | None, model: str, target: str, outcomes: tuple[float, ...]) -> StoredPredictions | None:
    """Return the stored answers, if their outcomes equal those of the report."""
    if folder is None:
        return None
    try:
        predictions = read_predictions(folder, model, target)
    except CompressError:
        return None
    return predictions if predictions.answers.correct.tolist() == [outcome == 1.0 for outcome in outcomes] else None


def examples_of(sides: Iterable[tuple[Report, Path | None]]) -> Callable[[int], str]:
    """Return a function from row number to text, from the first report whose data is available.

    Without any, the text says why.
    """
    reasons = []
    for report, folder in sides:
        try:
            # Each test row's inputs. Raises `InputError` if they are unavailable or have changed.
            if folder is None or not (folder / RECIPE).is_file():
                raise InputError("no recipe.yaml beside the report gives the location of its text")
            if report.data is None:
                raise InputError("the report has no digest to identify its rows")
            recipe = read_recipe(folder / RECIPE)
            # The test split with the class names of the report.
            config = recipe.data
            record = report.data
            if record.split not in config.splits:
                raise InputError(f"the recipe names no split {record.split!r}")
            # A folder that is moved away keeps the recipe's absolute paths, so the data is found wherever the run is.
            location = locate_split(config, record.split, folder, cached_directory)
            if location is None or isinstance(location, HubSplit):
                raise InputError(f"{config.source} is not on this machine, and nothing is fetched for a comparison")
            changes = {
                "splits": {record.split: config.splits[record.split]},
                "also": {},
                "unlabeled": (),
                "labels": record.labels or None,
            }
            data = load_dataset(config.model_copy(update=changes), TASKS[recipe.task].columns, folder, SilentProgress())
            if data.digest(report.data.split) != report.data.digest:
                raise InputError("the test split has changed since the report was written")
            texts = input_texts(data, report.data.split)
        except CompressError as error:
            reasons.append(error.what.rstrip("."))
        else:
            return lambda row: shorten(texts[row])
    reason_text = "; ".join(dict.fromkeys(reasons))
    return lambda row: f"row {row} of the test split ({reason_text})"


def input_texts(data: Dataset, split: str) -> list[str]:
    """Return the inputs of each row as text."""
    table = data.split(split)
    inputs = [shown(table[column.name]) for column in data.columns if not column.label]
    return [" \u00b7 ".join(row) for row in zip(*inputs, strict=True)]


def shorten(text: str) -> str:
    """Return ``text`` on one line, with an ellipsis if it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST else f"{flat[: _LONGEST - 1]}\u2026"


def find_answer_flips(sides: ComparedModels, *, most: int) -> tuple[Flip, ...]:
    """Return the instructions that only one side follows, at most ``most`` of either kind."""
    both = (sides.baseline, sides.baseline_model), (sides.candidate, sides.candidate_model)
    target = next((answer.target for answer in sides.candidate.answers), None)
    baseline, candidate = (
        {answer.prompt: answer for answer in report.answers if (answer.model, answer.target) == (model, target)}
        for report, model in both
    )
    flips: list[Flip] = []
    for row, (prompt, baseline_answer) in enumerate(baseline.items()):
        candidate_answer = candidate.get(prompt)
        if candidate_answer is None or bool(baseline_answer.missed) == bool(candidate_answer.missed):
            continue
        now: Literal["wrong", "right"] = "wrong" if candidate_answer.missed else "right"
        label = f"not {', '.join(candidate_answer.missed or baseline_answer.missed)}"
        if sum(flip.now == now for flip in flips) < most:
            answers = shorten(baseline_answer.text), shorten(candidate_answer.text)
            flips.append(Flip(row=row, now=now, label=label, baseline_answer=answers[0], candidate_answer=answers[1],
                              example=prompt))  # fmt: skip
    return tuple(flips)
