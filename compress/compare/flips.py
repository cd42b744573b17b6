"""Flips: the test examples that one model gets right and the other wrong, with what both answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from compress.compare.change import Flip
from compress.compare.examples import examples_of
from compress.errors import CompressError
from compress.measurement import Measurement
from compress.report.predictions import Found, read_predictions
from compress.report.schema import FINAL, Report


def flips(
    baseline: Report,
    candidate: Report,
    target: str,
    *,
    baseline_model: str = FINAL,
    candidate_model: str = FINAL,
    baseline_folder: Path | None = None,
    candidate_folder: Path | None = None,
    metric: str = "accuracy",
    most: int | None = None,
) -> tuple[Flip, ...]:
    """What was right and is wrong, then what was wrong and is right; the surest answers first, where known.

    Answers come from the `predictions.parquet` of the runs' folders, and texts from the data that a folder's
    `recipe.yaml` names, if its test rows are still those of the report; nothing is fetched. What cannot be had is
    left out: an answer or label is then empty, and ``example`` says where the row is and why its text is not given.
    ``most`` bounds how many of either kind are listed. Empty where the outcomes of the two do not pair.
    """
    before = baseline.find(baseline_model, metric, target)
    after = candidate.find(candidate_model, metric, target)
    if before is None or after is None or not _pair(baseline, candidate, before, after):
        return ()
    old = _answers(baseline_folder, baseline_model, target, before)
    new = _answers(candidate_folder, candidate_model, target, after)
    turned = _turned(before, after, new)
    chosen = [*turned["wrong"][:most], *turned["right"][:most]]
    if not chosen:
        return ()
    text = examples_of(((candidate, candidate_folder), (baseline, baseline_folder)))
    now = dict.fromkeys(turned["wrong"], "wrong") | dict.fromkeys(turned["right"], "right")
    return tuple(_flip(row, now[row] == "wrong", old, new, text) for row in chosen)


def _pair(baseline: Report, candidate: Report, before: Measurement, after: Measurement) -> bool:
    if before.raw is None or after.raw is None or len(before.raw) != len(after.raw):
        return False
    return not (baseline.data and candidate.data and baseline.data.digest != candidate.data.digest)


def _answers(folder: Path | None, model: str, target: str, row: Measurement) -> Found | None:
    """The kept answers, if they are those that the report counts."""
    if folder is None:
        return None
    try:
        found = read_predictions(folder, model, target)
    except CompressError:
        return None
    return found if found.answers.correct.tolist() == [outcome == 1.0 for outcome in row.raw or ()] else None


def _turned(
    before: Measurement, after: Measurement, new: Found | None
) -> Mapping[Literal["wrong", "right"], Sequence[int]]:
    pairs = list(enumerate(zip(before.raw or (), after.raw or (), strict=True)))
    wrong = [row for row, (old, now) in pairs if old > now]
    right = [row for row, (old, now) in pairs if old < now]
    if new is not None:
        sureness = new.answers.probability
        wrong, right = (sorted(rows, key=lambda row: -sureness[row]) for rows in (wrong, right))
    return {"wrong": wrong, "right": right}


def _flip(row: int, is_wrong: bool, old: Found | None, new: Found | None, text: Callable[[int], str]) -> Flip:
    known = new or old
    return Flip(
        row=row,
        now="wrong" if is_wrong else "right",
        label=known.labels[row] if known else "",
        baseline_answer=old.answers.answers[row] if old else "",
        candidate_answer=new.answers.answers[row] if new else "",
        example=text(row),
    )
