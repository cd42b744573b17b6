"""Flips: the test examples that one model gets right and the other wrong, with what both answered.

Texts are those of the data that a run's recipe names, if they can still be had; nothing is fetched for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from compress.data.config import DataConfig
from compress.data.dataset import Dataset, load_dataset
from compress.data.media import shown
from compress.data.samples.fetch import cached_directory
from compress.data.source import HubSplit, locate_split
from compress.recipe.loading import read_recipe
from compress.report.compare.change import Flip, Sides
from compress.report.predictions import Found, read_predictions
from compress.report.run_folder import RECIPE
from compress.results.report import DataRecord, Report
from compress.tasks.registry import get_task
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import SilentProgress

_LONGEST = 400


def flips(sides: Sides, target: str, metric: str = "accuracy", most: int | None = None) -> tuple[Flip, ...]:
    """What was right and is wrong, then what was wrong and is right; the surest answers first, where known.

    Answers come from the `predictions.parquet` of the runs' folders, and texts from the data that a folder's
    `recipe.yaml` names, if its test rows are still those of the report. What cannot be had is left out: an answer or
    label is then empty, and ``example`` says where the row is and why its text is not given. ``most`` bounds how many
    of either kind are listed. Empty where the outcomes of the two do not pair.
    """
    raw = sides.outcomes(metric, target)
    if raw is None:
        return ()
    old = _answers(sides.baseline_folder, sides.baseline_model, target, raw[0])
    new = _answers(sides.candidate_folder, sides.candidate_model, target, raw[1])
    pairs = list(enumerate(zip(*raw, strict=True)))
    wrong = [row for row, (before, after) in pairs if before > after]
    right = [row for row, (before, after) in pairs if before < after]
    if new is not None:
        sureness = new.answers.probability
        wrong, right = (sorted(rows, key=lambda row: -sureness[row]) for rows in (wrong, right))
    chosen = [*wrong[:most], *right[:most]]
    if not chosen:
        return ()
    known = new or old
    text = examples_of(((sides.candidate, sides.candidate_folder), (sides.baseline, sides.baseline_folder)))
    return tuple(
        Flip(
            row=row,
            now="wrong" if raw[0][row] > raw[1][row] else "right",
            label=known.labels[row] if known else "",
            baseline_answer=old.answers.answers[row] if old else "",
            candidate_answer=new.answers.answers[row] if new else "",
            example=text(row),
        )
        for row in chosen
    )


def _answers(folder: Path | None, model: str, target: str, outcomes: tuple[float, ...]) -> Found | None:
    """The kept answers, if they are those that the report counts."""
    if folder is None:
        return None
    try:
        found = read_predictions(folder, model, target)
    except CompressError:
        return None
    return found if found.answers.correct.tolist() == [outcome == 1.0 for outcome in outcomes] else None


def examples_of(sides: Iterable[tuple[Report, Path | None]]) -> Callable[[int], str]:
    """A row's text by its number, from the first of the reports whose folder leads to it; else why there is none."""
    reasons = []
    for report, folder in sides:
        try:
            texts = _texts(report, folder)
        except CompressError as error:
            reasons.append(error.what.rstrip("."))
        else:
            return lambda row: shortened(texts[row])
    why = "; ".join(dict.fromkeys(reasons))
    return lambda row: f"row {row} of the test split ({why})"


def _texts(report: Report, folder: Path | None) -> list[str]:
    """Each test row's inputs. Raises `InputError` where they are not to be had or are no longer the same."""
    if folder is None or not (folder / RECIPE).is_file():
        raise InputError("no recipe.yaml beside the report says where its text is")
    if report.data is None:
        raise InputError("the report names no digest by which its rows could be known again")
    recipe = read_recipe(folder / RECIPE)
    data = _test_split(recipe.data, recipe.task, report.data, folder)
    if data.digest(report.data.split) != report.data.digest:
        raise InputError("the test split has changed since the report was written")
    return input_texts(data, report.data.split)


def input_texts(data: Dataset, split: str) -> list[str]:
    """The inputs of each row as text."""
    table = data.split(split)
    inputs = [shown(table[column.name]) for column in data.columns if not column.label]
    return [" \u00b7 ".join(row) for row in zip(*inputs, strict=True)]


def _test_split(config: DataConfig, task: str, kept: DataRecord, folder: Path) -> Dataset:
    """The test split alone, with the class names of the report."""
    if kept.split not in config.splits:
        raise InputError(f"the recipe names no split {kept.split!r}")
    # A folder that is moved away keeps the recipe's absolute paths, so the data is found wherever the run is.
    place = locate_split(config, kept.split, folder, cached_directory)
    if place is None or isinstance(place, HubSplit):
        raise InputError(f"{config.source} is not on this machine, and nothing is fetched for a comparison")
    alone = {
        "splits": {kept.split: config.splits[kept.split]},
        "also": {},
        "unlabeled": (),
        "labels": kept.labels or None,
    }
    return load_dataset(config.model_copy(update=alone), get_task(task).columns, folder, SilentProgress())


def shortened(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST else f"{flat[: _LONGEST - 1]}\u2026"


def answer_flips(sides: Sides, *, most: int) -> tuple[Flip, ...]:
    """The instructions that one side follows and the other doesn't, at most ``most`` of either kind."""
    both = (sides.baseline, sides.baseline_model), (sides.candidate, sides.candidate_model)
    target = next((one.target for one in sides.candidate.answers), None)
    before, after = (
        {one.prompt: one for one in report.answers if (one.model, one.target) == (model, target)}
        for report, model in both
    )
    found: list[Flip] = []
    for row, (prompt, old) in enumerate(before.items()):
        new = after.get(prompt)
        if new is None or bool(old.missed) == bool(new.missed):
            continue
        now: Literal["wrong", "right"] = "wrong" if new.missed else "right"
        label = f"not {', '.join(new.missed or old.missed)}"
        if sum(flip.now == now for flip in found) < most:
            answers = shortened(old.text), shortened(new.text)
            found.append(Flip(row=row, now=now, label=label, baseline_answer=answers[0], candidate_answer=answers[1],
                              example=prompt))  # fmt: skip
    return tuple(found)
