"""Flips of two made-up runs: rows, answers and texts, and what is said where they cannot be had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run

from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.report.compare.change import ComparedModels
from compress.report.compare.flips import find_flips
from compress.report.predictions import ModelAnswers, write_predictions
from compress.results.measurement import Measurement
from compress.results.report import DataRecord, Report
from compress.tasks.registry import get_task
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
    """A run's folder with data, recipe and predictions, and its report."""
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
        digest = load_dataset(config, get_task("text-classification").columns, folder, SilentProgress()).digest("test")
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


def test_each_flip_once_with_answers_and_text_the_surest_first(sides: tuple[Report, Report, Path, Path]) -> None:
    assert flips_between(sides) == [
        (4, "wrong", "bad", "bad", "good", "awful"),
        (0, "wrong", "bad", "bad", "good", "dull"),
        (5, "wrong", "good", "good", "bad", "great"),
        (2, "right", "bad", "good", "bad", "boring"),
    ]


def test_no_more_than_asked_of_either_kind(sides: tuple[Report, Report, Path, Path]) -> None:
    assert [flip[0] for flip in flips_between(sides, most=1)] == [4, 2]
    assert flips_between(sides, most=0) == []


def test_without_folders_there_are_rows_and_a_reason(sides: tuple[Report, Report, Path, Path]) -> None:
    flips = flips_between(sides, baseline_folder=None, candidate_folder=None)
    assert [flip[0] for flip in flips] == [0, 4, 5, 2]
    reason = "row 0 of the test split (no recipe.yaml beside the report says where its text is)"
    assert flips[0] == (0, "wrong", "", "", "", reason)


def test_the_other_runs_folder_does_as_well(sides: tuple[Report, Report, Path, Path]) -> None:
    flips = flips_between(sides, candidate_folder=None)
    assert flips[0] == (0, "wrong", "bad", "bad", "", "dull")


def test_a_test_split_that_has_changed_is_not_shown(sides: tuple[Report, Report, Path, Path]) -> None:
    for folder in sides[2:]:
        write_data(folder, texts=("a", *TEXTS[1:]))
    assert (
        flips_between(sides)[0][-1]
        == "row 4 of the test split (the test split has changed since the report was written)"
    )


def test_data_that_is_gone_is_told(sides: tuple[Report, Report, Path, Path]) -> None:
    for folder in sides[2:]:
        (folder / "test.csv").unlink()
    assert "does not exist" in flips_between(sides)[0][-1]


def test_nothing_is_fetched(sides: tuple[Report, Report, Path, Path]) -> None:
    for folder in sides[2:]:
        write_data(folder, source="someone/something", splits={"train": "train", "validation": "v", "test": "test"})
    assert "nothing is fetched" in flips_between(sides)[0][-1]


def test_answers_of_another_run_are_not_believed(sides: tuple[Report, Report, Path, Path]) -> None:
    old, new = sides[2:]
    (new / "predictions.parquet").write_bytes((old / "predictions.parquet").read_bytes())
    assert {flip[4] for flip in flips_between(sides)} == {""}
    (new / "predictions.parquet").write_bytes(b"PAR1")
    assert {flip[4] for flip in flips_between(sides)} == {""}
    assert {flip[3] for flip in flips_between(sides)} == {"bad", "good"}


def test_long_texts_are_cut(sides: tuple[Report, Report, Path, Path], tmp_path: Path) -> None:
    baseline_folder, candidate_folder, old, new = sides
    texts = [f"{text} " + "very " * 200 for text in TEXTS]
    for folder in (old, new):
        write_data(folder, texts)
    config = DataConfig(splits={"test": "test.csv"})
    digest = load_dataset(config, get_task("text-classification").columns, new, SilentProgress()).digest("test")
    data = DataRecord(digest=digest, rows=6, labels=("bad", "good"))
    changed = [report.model_copy(update={"data": data}) for report in (baseline_folder, candidate_folder)]
    text = flips_between((changed[0], changed[1], old, new))[0][-1]
    assert text.startswith("awful very very")
    assert len(text) == 400


def test_other_data_has_no_flips(sides: tuple[Report, Report, Path, Path], tmp_path: Path) -> None:
    baseline_folder, candidate_folder = sides[:2]
    other = run(tmp_path / "other", AFTER, digest="another")
    assert find_flips(ComparedModels(baseline_folder, other), "cpu") == ()
    assert find_flips(ComparedModels(baseline_folder, candidate_folder), "gpu") == ()
