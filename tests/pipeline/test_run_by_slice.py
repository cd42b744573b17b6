"""Tests of slices in a complete run: accuracy and calibration per slice, and slice changes without re-evaluation."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import tiny_run
from command_line import invoke, output_of
from typer.testing import CliRunner

from compress.cli import app
from compress.pipeline.keys import CachedStages
from compress.pipeline.planning import make_plan
from compress.pipeline.run import Run, run
from compress.results.report import load_report
from compress.utils.errors import DataError, InputError

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")

SLICES: list[dict[str, Any]] = [
    {"column": "source", "min_rows": 5},
    {"length": "quartiles", "unit": "tokens"},
    {"name": "many stars", "column": "stars", "at_least": 4},
    {"name": "shouted", "column": "text", "contains": "!"},
]


@dataclass
class Done:
    """A finished run, the notes it printed, and the rows of its test split."""

    run: Run
    said: list[str]
    rows: list[dict[str, Any]]

    def accuracy(self, name: str, model: str = "final") -> float:
        """Return the reported accuracy of ``model`` on the slice ``name``."""
        row = self.run.report.find(model, f"accuracy[{name}]", "cpu")
        assert row is not None
        return row.value


def write(folder: Path, **changes: Any) -> Path:
    """Write a tiny recipe whose test rows have the columns `source` and `stars`, the latter null in every 7th row."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_run.write_model(folder / "model", tiny_run.LABELS)
    tiny_run.write_rows(folder)
    lines = (folder / "test.csv").read_text().splitlines()
    with (folder / "test.jsonl").open("w") as file:
        for row, line in enumerate(lines[1:]):
            text, label = line.split(",")
            stars = row % 6 if row % 7 else None
            file.write(json.dumps({"text": text, "label": label, "source": "abc"[row % 3], "stars": stars}) + "\n")
    splits = {"train": "train.csv", "validation": "validation.csv", "test": "test.jsonl"}
    recipe: dict[str, Any] = {
        "data": {"splits": splits, "max_length": 16},
        "stages": [{"onnx": {}}, {"onnx_int8": {}}],
        "baseline": "start",
        "slices": SLICES,
        "limits": [{"metric": "accuracy[source=a]", "at_least": 0.0}],
    }
    return tiny_run.write_recipe(folder, **{**recipe, **changes})


def go(recipe: Path, artifacts: Path, *overrides: str) -> Done:
    notes = tiny_run.Notes()
    finished = run(tiny_run.load(recipe, *overrides), recipe.parent, artifacts, notes)
    rows = [json.loads(line) for line in (recipe.parent / "test.jsonl").read_text().splitlines()]
    return Done(finished, notes.said, rows)


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    write(folder)
    return folder


@pytest.fixture(scope="module")
def done(recipe_folder: Path) -> Done:
    return go(recipe_folder / "tiny.yaml", recipe_folder / "artifacts")


def saved_predictions(done: Done) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pyarrow.parquet.read_table(done.run.folder / "predictions.parquet").to_pylist()
    return rows


def share(values: list[bool]) -> float:
    return sum(values) / len(values)


def test_slice_accuracy_is_that_of_saved_predictions(done: Done) -> None:
    right = [row["final.correct"] for row in saved_predictions(done)]
    assert [row["label"] for row in saved_predictions(done)] == [row["label"] for row in done.rows]
    assert [row["final.answer"] == row["label"] for row in saved_predictions(done)] == right
    assert len(set(right)) == 2
    for source in "abc":
        expected = share([hit for hit, row in zip(right, done.rows, strict=True) if row["source"] == source])
        assert done.accuracy(f"source={source}") == pytest.approx(expected)
    starry = [hit for hit, row in zip(right, done.rows, strict=True) if (row["stars"] or 0) >= 4]
    assert 10 < len(starry) < 20
    assert done.accuracy("many stars") == pytest.approx(share(starry))


def test_report_lists_data_slices_and_empty_ones(done: Done) -> None:
    report = load_report(done.run.folder / "report.json")
    assert report == done.run.report
    assert report.data is not None
    assert (report.data.rows, report.data.labels) == (60, tiny_run.LABELS)
    lock = json.loads((done.run.folder / "lock.json").read_text())
    assert report.data.digest == lock["data"]["test"]
    assert report.slices["source=b"].indices() == tuple(range(1, 60, 3))
    assert next(name for name in report.slices if name.startswith("tokens=")) == "tokens=Q1"
    assert "The slice 'shouted' holds no row of the test split, so nothing can be measured on it." in report.notes
    assert "shouted" not in report.slices


def test_token_slices_use_tokenizer_of_baseline(done: Done) -> None:
    tokenizer = tiny_run.tokenizer()
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in done.rows]
    quartile = sorted(lengths)[14]
    expected = tuple(index for index, length in enumerate(lengths) if length <= quartile)
    assert done.run.report.slices["tokens=Q1"].indices() == expected


def test_calibration_is_measured_on_every_model(done: Done) -> None:
    report = done.run.report
    for model in report.models:
        for metric in ("calibration_error", "brier_score"):
            row = report.find(model, metric, "cpu")
            assert row is not None
            assert row.low is not None
            assert row.high is not None
            assert row.low <= row.value <= row.high
    curve = next(curve for curve in report.calibration if curve.model == "final")
    sure = [row["final.probability"] for row in saved_predictions(done)]
    assert sum(bin.rows for bin in curve.bins) == 60
    mean = sum(bin.rows * bin.confidence for bin in curve.bins) / 60
    assert mean == pytest.approx(sum(sure) / 60, rel=1e-5)
    error = report.find("final", "calibration_error", "cpu")
    assert error is not None
    assert error.value == pytest.approx(sum(bin.rows * abs(bin.accuracy - bin.confidence) for bin in curve.bins) / 60)


def test_limit_may_apply_to_a_slice(done: Done) -> None:
    (limit,) = done.run.report.limits
    assert (limit.metric, limit.passed) == ("accuracy[source=a]", True)
    assert limit.value == done.accuracy("source=a")


def test_changed_slices_are_recomputed_without_evaluation(recipe_folder: Path, done: Done, tmp_path: Path) -> None:
    shutil.copytree(recipe_folder, tmp_path / "place", symlinks=True)
    cache = tmp_path / "place" / "artifacts" / "cache"
    names_before = {path.name for path in cache.iterdir()}
    path = tmp_path / "place" / "test.jsonl"
    # Only a column that slices read has changed, so no model is evaluated again.
    path.write_text(path.read_text().replace('"source": "a"', '"source": "z"'))
    again = go(tmp_path / "place" / "tiny.yaml", tmp_path / "place" / "artifacts")
    assert again.accuracy("source=z") == done.accuracy("source=a")
    assert again.run.report.find("final", "accuracy[source=a]", "cpu") is None
    assert again.run.report.missed[0].metric == "accuracy[source=a]"
    third = go(tmp_path / "place" / "tiny.yaml", tmp_path / "place" / "artifacts", "slices=[]", "limits=[]")
    assert third.run.report.slices == {}
    assert {path.name for path in cache.iterdir()} == names_before


def test_invalid_slice_fails_before_any_stage(recipe_folder: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "place", slices=[{"name": "x", "column": "source", "at_least": 3}], limits=[])
    with pytest.raises(DataError, match="compares numbers"):
        go(recipe, tmp_path / "artifacts")
    assert not (tmp_path / "artifacts" / "cache").exists()


@pytest.mark.parametrize("name", ["test.jsonl", "test.csv"])
def test_check_rejects_slice_of_missing_column(tmp_path: Path, name: str) -> None:
    recipe = write(tmp_path, slices=[{"column": "sources"}])
    loaded = tiny_run.load(recipe, f"data.splits.test={name}")
    with pytest.raises(InputError, match="no column 'sources', which a slice reads") as caught:
        make_plan(loaded, tmp_path, CachedStages(loaded, tmp_path, tmp_path / "artifacts"))
    assert ("Did you mean 'source'?" in str(caught.value)) == (name == "test.jsonl")


def test_evaluate_by_slice_repeats_metrics_of_run(done: Done) -> None:
    result = invoke("evaluate", done.run.folder, "--by-slice", "--json")
    rows = {row["metric"]: row["value"] for row in json.loads(result.stdout)}
    for name in done.run.report.slices:
        assert rows[f"accuracy[{name}]"] == pytest.approx(done.accuracy(name))
    assert "The slice 'shouted' holds no row" in result.stderr
    shown = CliRunner().invoke(app, ["evaluate", str(done.run.folder), "--by-slice"], env={"COLUMNS": "140"})
    assert "accuracy[source=a]" in shown.stdout
    assert not any("[" in row["metric"] for row in json.loads(output_of("evaluate", done.run.folder, "--json")))
