"""Tests of prediction flips and of changes by slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run

from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.numerics.differences import difference_of_shares
from compress.report.compare.change import ComparedModels
from compress.report.compare.effects import largest_change, slice_changes
from compress.report.compare.flips import find_flips
from compress.report.run_folder import ModelAnswers, write_predictions
from compress.results.report import DataRecord, Measurement, Report, SliceRecord
from compress.tasks.registry import TASKS
from compress.utils.progress import SilentProgress

TEXTS = ("dull", "lovely", "boring", "superb", "awful", "great")
LABELS = ("bad", "good", "bad", "good", "bad", "good")
BEFORE = ("bad", "good", "good", "bad", "bad", "good")
AFTER = ("good", "good", "bad", "bad", "good", "bad")
SURE = (0.6, 0.9, 0.8, 0.7, 0.95, 0.55)


def write_data(folder: Path, texts: Sequence[str] = TEXTS, **changes: Any) -> None:
    lines = [f"{text},{label}" for text, label in zip(texts, LABELS, strict=True)]
    (folder / "test.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    (folder / "train.csv").write_text("text,label\nother,good\nelse,bad\n")
    data = {"splits": {"train": "train.csv", "validation": "train.csv", "test": "test.csv"}, **changes}
    tiny_run.write_recipe(folder, "recipe", data=data)


def run(folder: Path, answers: Sequence[str], digest: str | None = None) -> Report:
    """Write a run folder with data, recipe and predictions and return its report."""
    folder.mkdir()
    write_data(folder)
    right = [answer == label for answer, label in zip(answers, LABELS, strict=True)]
    model_answers = ModelAnswers(answers, np.array(SURE), np.array(right))
    write_predictions(LABELS, {("final", "cpu"): model_answers}, folder, several=False)
    raw = tuple(float(outcome) for outcome in right)
    row = Measurement(
        model="final", metric="accuracy", target="cpu", value=np.mean(raw), unit="ratio", n=len(raw), raw=raw
    )
    if digest is None:
        config = DataConfig(splits={"test": "test.csv"})
        digest = load_dataset(config, TASKS["text-classification"].columns, folder, SilentProgress()).digest("test")
    data = DataRecord(digest=digest, rows=len(raw), labels=("bad", "good"))
    return Report(recipe="recipe", measurements=(row,), data=data)


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Report, Report, Path, Path]:
    baseline_folder, candidate_folder = tmp_path / "before", tmp_path / "after"
    return run(baseline_folder, BEFORE), run(candidate_folder, AFTER), baseline_folder, candidate_folder


def flips_between(sides: tuple[Report, Report, Path, Path], **more: Any) -> list[tuple[Any, ...]]:
    baseline_folder, candidate_folder, old, new = sides
    most = more.pop("most", None)
    flips = find_flips(
        ComparedModels(baseline_folder, candidate_folder, **{"baseline_folder": old, "candidate_folder": new, **more}),
        "cpu",
        most=most,
    )
    return [(f.row, f.now, f.label, f.baseline_answer, f.candidate_answer, f.example) for f in flips]


def test_flips_have_predictions_and_text_most_confident_first(sides: tuple[Report, Report, Path, Path]) -> None:
    assert flips_between(sides) == [
        (4, "wrong", "bad", "bad", "good", "awful"),
        (0, "wrong", "bad", "bad", "good", "dull"),
        (5, "wrong", "good", "good", "bad", "great"),
        (2, "right", "bad", "good", "bad", "boring"),
    ]


def test_number_of_flips_per_direction_is_limited(sides: tuple[Report, Report, Path, Path]) -> None:
    assert [flip[0] for flip in flips_between(sides, most=1)] == [4, 2]
    assert flips_between(sides, most=0) == []


def test_flips_without_run_folders_have_row_numbers_and_a_reason(sides: tuple[Report, Report, Path, Path]) -> None:
    flips = flips_between(sides, baseline_folder=None, candidate_folder=None)
    assert [flip[0] for flip in flips] == [0, 4, 5, 2]
    reason = "row 0 of the test split (no recipe.yaml beside the report gives the location of its text)"
    assert flips[0] == (0, "wrong", "", "", "", reason)


def test_text_comes_from_either_run_folder(sides: tuple[Report, Report, Path, Path]) -> None:
    flips = flips_between(sides, candidate_folder=None)
    assert flips[0] == (0, "wrong", "bad", "bad", "", "dull")


SOURCE = {"source": "someone/something", "splits": {"train": "train", "validation": "v", "test": "test"}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: write_data(folder, ("a", *TEXTS[1:])), "row 4 of the test split (the test split has changed"),
        (lambda folder: (folder / "test.csv").unlink(), "does not exist"),
        (lambda folder: write_data(folder, **SOURCE), "nothing is fetched"),
    ],
)
def test_missing_text_is_explained(
    sides: tuple[Report, Report, Path, Path], change: Callable[[Path], None], reason: str
) -> None:
    for folder in sides[2:]:
        change(folder)
    assert reason in flips_between(sides)[0][-1]


def test_predictions_of_another_run_are_ignored(sides: tuple[Report, Report, Path, Path]) -> None:
    old, new = sides[2:]
    (new / "predictions.parquet").write_bytes((old / "predictions.parquet").read_bytes())
    assert {flip[4] for flip in flips_between(sides)} == {""}
    (new / "predictions.parquet").write_bytes(b"PAR1")
    assert {flip[4] for flip in flips_between(sides)} == {""}
    assert {flip[3] for flip in flips_between(sides)} == {"bad", "good"}


def test_runs_on_different_data_have_no_flips(sides: tuple[Report, Report, Path, Path], tmp_path: Path) -> None:
    baseline_folder, candidate_folder = sides[:2]
    other = run(tmp_path / "other", AFTER, digest="another")
    assert find_flips(ComparedModels(baseline_folder, other), "cpu") == ()
    assert find_flips(ComparedModels(baseline_folder, candidate_folder), "gpu") == ()


ROWS = 200


def row(outcomes: Sequence[float], model: str = "final") -> Measurement:
    value = float(np.mean(outcomes))
    n, raw = len(outcomes), tuple(float(outcome) for outcome in outcomes)
    return Measurement(model=model, metric="accuracy", target="cpu", value=value, unit="ratio", n=n, raw=raw)


def records(slices: Mapping[str, range], count: int) -> dict[str, SliceRecord]:
    return {name: SliceRecord.of([index in rows for index in range(count)]) for name, rows in slices.items()}


def report(outcomes: Sequence[float], slices: Mapping[str, range] | None = None, digest: str = "d") -> Report:
    slice_records = records(slices or {}, len(outcomes))
    return Report(
        recipe="r",
        measurements=(row(outcomes),),
        data=DataRecord(digest=digest, rows=len(outcomes)),
        slices=slice_records,
    )


SLICE_BEFORE = [1] * 150 + [0] * 50
SLICE_AFTER = [1] * 90 + [0] * 60 + [1] * 10 + [0] * 40
SLICES = {"head": range(80, 160), "tail": range(140, 200), "kept": range(0, 90)}


def test_shares_and_intervals_of_overlapping_slices() -> None:
    changes = {
        part.name: part
        for part in slice_changes(ComparedModels(report(SLICE_BEFORE), report(SLICE_AFTER, SLICES)), "cpu", 0.01, 0.9)
    }
    head, tail, overlapping = changes["head"].change, changes["tail"].change, changes["kept"].change
    # head: rows 80-159 are right 70 times before; after, 80-89 and 150-159. 60 were lost and 10 won, of 80.
    assert (head.baseline, head.candidate, head.n) == (70 / 80, 20 / 80, 80)
    slice_confidence = 1 - 0.1 / 3
    assert head.confidence == pytest.approx(slice_confidence)
    assert (head.effect, head.low, head.high) == pytest.approx(difference_of_shares(60, 10, 80, slice_confidence))
    # tail: rows 140-199 are right 10 times before and, others, 10 times after.
    assert (tail.baseline, tail.candidate, tail.effect) == (10 / 60, 10 / 60, 0)
    assert (tail.low, tail.high) == pytest.approx(difference_of_shares(10, 10, 60, slice_confidence)[1:])
    assert (overlapping.baseline, overlapping.candidate) == (1, 1)
    assert [changes[name].change.verdict for name in SLICES] == ["worse", "can't tell", "can't tell"]
    assert changes["head"].change.more == 0
    assert (changes["tail"].change.more or 0) > 60


def test_slices_are_sorted_by_change() -> None:
    changes = slice_changes(
        ComparedModels(report(SLICE_BEFORE), report(SLICE_AFTER, {**SLICES, "won": range(150, 160)})), "cpu", 0.01, 0.9
    )
    assert changes[0].name == "head"
    assert [part.change.effect for part in changes] == sorted(part.change.effect for part in changes)
    assert changes[-1].name == "won"
    largest = largest_change(changes)
    assert largest is not None
    assert (largest.name, largest.change.effect, largest.rows) == ("won", 1.0, 10)
    assert largest_change(()) is None


def test_single_slice_needs_no_multiple_comparison_correction() -> None:
    (only,) = slice_changes(
        ComparedModels(report(SLICE_BEFORE), report(SLICE_AFTER, {"head": range(80, 160)})), "cpu", 0.01, 0.9
    )
    assert only.change.confidence == pytest.approx(0.9)
    assert only.change.note is None


def test_slices_of_the_baseline_are_the_fallback() -> None:
    changes = slice_changes(ComparedModels(report(SLICE_BEFORE, SLICES), report(SLICE_AFTER)), "cpu", 0.01, 0.9)
    assert {part.name for part in changes} == set(SLICES)


BARE = report(SLICE_AFTER, SLICES).model_copy(
    update={"measurements": (row(SLICE_AFTER).model_copy(update={"raw": None}),)}
)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (report(SLICE_BEFORE), report(SLICE_AFTER)),
        (report(SLICE_BEFORE), report(SLICE_AFTER[:100], {"a": range(1)})),
        (report(SLICE_BEFORE, digest="e"), report(SLICE_AFTER, SLICES)),
        (report([0.5] * 200), report(SLICE_AFTER, SLICES)),
        (report(SLICE_BEFORE), BARE),
        (
            report(SLICE_BEFORE[:100]),
            report(SLICE_AFTER[:100]).model_copy(update={"slices": report(SLICE_BEFORE, SLICES).slices}),
        ),
    ],
)
def test_unpaired_reports_have_no_slice_changes(before: Report, after: Report) -> None:
    assert slice_changes(ComparedModels(before, after), "cpu", 0.01, 0.9) == ()
    assert slice_changes(ComparedModels(report(SLICE_BEFORE), report(SLICE_AFTER, SLICES)), "gpu", 0.01, 0.9) == ()
