"""Tests of the Python API: `import compress`, then check, run, load, evaluate and search."""

from __future__ import annotations

import csv
import importlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import yaml
from parsed_pages import parse_page
from pyarrow import parquet

import compress
from compress import api, plugins
from compress.pipeline.run import Run
from compress.report.notebook import report_table
from compress.results.report import load_report
from compress.utils.errors import CompressError, InputError, RecipeError

ROOT = Path(__file__).parents[1]
TRAINED = {"epochs": 1, "batch_size": 4, "learning_rate": 2e-3}
STAGES: list[Any] = [{"finetune": TRAINED}, "onnx", {"onnx_int8": {}}]
LIMITS = [{"metric": "accuracy", "at_least": 0.5}, {"metric": "size_bytes", "at_most": 0.5, "of": "baseline"}]
RUN = """
import json, sys
import compress
run = compress.run(sys.argv[1], artifacts=sys.argv[2])
print(json.dumps({stage.name: stage.cached for stage in run.report.stages}))
"""

needs_export = pytest.mark.filterwarnings("ignore::FutureWarning:torch", "ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model, data and a recipe, which no test changes."""
    folder = tmp_path_factory.mktemp("place")
    benchmark = {**tiny_run.BENCHMARK, "every_stage": False}
    tiny_run.write_all(folder, stages=STAGES, limits=LIMITS, benchmark=benchmark)
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> Run:
    """Run the recipe."""
    return compress.run(place / "tiny.yaml", artifacts=place / "artifacts")


def fields_of(place: Path) -> dict[str, Any]:
    """Return the recipe as a mapping with absolute paths."""
    fields: dict[str, Any] = yaml.safe_load((place / "tiny.yaml").read_text())
    fields["model"] = place / "model"
    fields["data"]["splits"] = {split: str(place / file) for split, file in fields["data"]["splits"].items()}
    return fields


def rows_of(place: Path) -> list[dict[str, str]]:
    with (place / "test.csv").open() as file:
        return list(csv.DictReader(file))


def python(code: str, *arguments: str | Path, folder: Path | None = None) -> str:
    """Run code in a new Python process and return what it prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=tiny_run.surroundings(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_imports_no_other_package() -> None:
    code = """
import sys, time
before = set(sys.modules)
began = time.perf_counter()
import compress
seconds = time.perf_counter() - began
print(seconds, *sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    measured = [python(code).split() for _ in range(3)]
    # The quickest of three, since other processes run at the same time.
    assert min(float(seconds) for seconds, *_ in measured) < 0.05
    # `openvino_telemetry` is the place of a package that must not be imported.
    assert all(modules == ["compress", "openvino_telemetry"] for _, *modules in measured)


def test_every_public_name_exists_and_is_no_submodule() -> None:
    folder = Path(compress.__file__).parent
    for name in compress.__all__:
        assert getattr(compress, name) is getattr(api, name)
        assert not (folder / name).exists() and not (folder / f"{name}.py").exists()
    assert set(compress.__all__) == set(api.__all__) <= set(dir(compress))
    assert importlib.import_module("compress.evaluation").__name__ == "compress.evaluation"
    with pytest.raises(AttributeError, match="module 'compress' has no attribute 'runs'"):
        _ = compress.runs


def test_check_accepts_a_path_a_mapping_and_a_recipe(place: Path, tmp_path: Path) -> None:
    plans = [
        compress.check(place / "tiny.yaml", artifacts=tmp_path),
        compress.check(str(place / "tiny.yaml"), artifacts=str(tmp_path)),
        compress.check(fields_of(place), artifacts=tmp_path),
        compress.check(api.read_recipe(fields_of(place))[0], artifacts=tmp_path),
    ]
    assert {tuple(stage.label for stage in plan.stages) for plan in plans} == {("finetune", "onnx", "onnx_int8")}
    assert {plan.recipe for plan in plans} == {"tiny"}


def test_check_replaces_fields(place: Path, tmp_path: Path) -> None:
    changes = ["name=other", 'stages=["onnx"]', "baseline=onnx"]
    plan = compress.check(place / "tiny.yaml", set=changes, artifacts=tmp_path)
    assert (plan.recipe, [stage.label for stage in plan.stages]) == ("other", ["onnx"])


def test_a_mapping_is_not_changed(place: Path, tmp_path: Path) -> None:
    fields = fields_of(place)
    before = repr(fields)
    compress.check(fields, set=["name=other"], artifacts=tmp_path)
    assert repr(fields) == before


def test_plan_is_a_preformatted_table_in_notebooks(place: Path, tmp_path: Path) -> None:
    page = compress.check(place / "tiny.yaml", artifacts=tmp_path)._repr_html_()
    assert page.startswith("<pre") and page.endswith("</pre>")
    assert "onnx_int8" in page and "disk" in page


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task": "text-clasification"}, "Did you mean 'text-classification'?"),
        ({"stages": []}, "the recipe: stages: found an empty list"),
        ({"limit": []}, "the recipe: limit"),
        ({"model": "./nowhere"}, "There is no model './nowhere'"),
    ],
)
def test_mistakes_in_a_mapping_are_recipe_or_input_errors(
    change: dict[str, Any], expected: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as error:
        compress.check({**fields_of(place), **change}, artifacts=tmp_path)
    assert expected in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_is_a_recipe_error(tmp_path: Path) -> None:
    for function in (compress.check, compress.run):
        with pytest.raises(RecipeError, match="no such file"):
            function(tmp_path / "missing.yaml")
    with pytest.raises(CompressError, match="There is no model in"):
        compress.load(tmp_path / "missing")
    with pytest.raises(CompressError, match="There is no model in"):
        compress.evaluate(str(tmp_path / "missing"))


def test_unknown_name_gets_the_recipes_that_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("reviews", "tickets"):
        (tmp_path / "artifacts" / "runs" / name / "latest").mkdir(parents=True)
    (tmp_path / "artifacts" / "runs" / "stopped").mkdir()
    with pytest.raises(CompressError, match="Did you mean 'reviews'") as caught:
        compress.load("review")
    assert caught.value.hint == "recipes with a run in this folder: reviews, tickets"


def test_search_without_its_plugin_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {name: found for name, found in plugins._discover().items() if name != "search"}
    monkeypatch.setattr(plugins, "_discover", lambda: others)
    with pytest.raises(InputError) as error:
        compress.search({"name": "x"})
    text = str(error.value)
    assert "the plug-in search, which provides 'search' and is not installed; " in text
    assert json.loads(plugins.CATALOGUE.read_text())["plugins"]["search"]["install"] in text


def test_search_refuses_unknown_options() -> None:
    pytest.importorskip("compress.plugins.search")
    with pytest.raises(InputError, match=r"has no option 'bugdet'\. Did you mean 'budget'"):
        compress.search(bugdet="10m")


@pytest.mark.slow
@needs_export
def test_predictions_are_those_of_the_runs_evaluation(finished: Run, place: Path) -> None:
    rows = rows_of(place)
    predictions = finished.load().predict([row["text"] for row in rows])
    stored = parquet.read_table(finished.folder / "predictions.parquet")
    accuracy = finished.report.find("final", "accuracy", "cpu")
    assert accuracy is not None
    right = [prediction["label"] == row["label"] for prediction, row in zip(predictions, rows, strict=True)]
    assert sum(right) / len(right) == accuracy.value
    assert tuple(map(float, right)) == accuracy.raw
    assert [prediction["label"] for prediction in predictions] == stored["final.answer"].to_pylist()
    probabilities = [prediction["score"] for prediction in predictions]
    assert probabilities == pytest.approx(stored["final.probability"].to_pylist(), abs=1e-5)


@pytest.mark.slow
@needs_export
def test_report_is_a_table_in_notebooks(finished: Run) -> None:
    page = finished._repr_html_()
    assert page == finished.report._repr_html_() == report_table(finished.report)
    assert parse_page(page)
    assert "All 2 limits are kept" in page
    assert "<td>Accuracy</td>" in page and "kept (≥ 50%)" in page and "smaller" in page


@pytest.mark.slow
@needs_export
def test_text_of_a_report_is_escaped_in_notebooks(finished: Run) -> None:
    report = finished.report.model_copy(update={"recipe": "<script>alert(1)</script>"})
    assert "<script" not in report_table(report)


@pytest.mark.slow
@needs_export
def test_evaluate_returns_the_measurements_of_the_run(finished: Run) -> None:
    rows = {row.metric: row for row in compress.evaluate(finished.folder)}
    for metric in ("accuracy", "f1", "brier_score"):
        expected = finished.report.find("final", metric, "cpu")
        assert expected is not None and rows[metric].value == pytest.approx(expected.value)


@pytest.mark.slow
@needs_export
def test_evaluate_measures_other_rows_with_the_classes_of_the_model(finished: Run, place: Path, tmp_path: Path) -> None:
    others = tmp_path / "others.csv"
    chosen = [row for row in rows_of(place) if row["label"] == "good"]  # one of two classes, which is too few to train
    others.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in chosen))
    predictions = finished.load().predict([row["text"] for row in chosen])
    right = [prediction["label"] == row["label"] for prediction, row in zip(predictions, chosen, strict=True)]
    measured = {row.metric: row for row in compress.evaluate(finished.folder, data=others)}["accuracy"]
    assert measured.raw == tuple(map(float, right)) and measured.value == sum(right) / len(right)
    others.write_text(f"text,label\n{chosen[0]['text']},good\n{chosen[1]['text']},excellent\n")
    with pytest.raises(CompressError, match="excellent"):
        compress.evaluate(finished.folder, data=others)


@pytest.mark.slow
@needs_export
def test_other_rows_must_exist_and_replace_only_the_test_split(finished: Run, place: Path) -> None:
    with pytest.raises(InputError, match=r"There is no file '.*none\.csv'") as caught:
        compress.evaluate(finished.folder, data=place / "none.csv")
    assert caught.value.where == "--data"
    with pytest.raises(InputError, match="--data replace the test split, and --split names 'validation'"):
        compress.evaluate(finished.folder, data=place / "test.csv", split="validation")


@pytest.mark.slow
@needs_export
def test_load_opens_a_runs_folder_its_model_and_a_named_run(
    finished: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    text = rows_of(place)[0]["text"]
    expected = finished.load().predict(text)
    for artifact in (finished.folder, str(finished.folder / "model"), "tiny"):
        assert compress.load(artifact, "cpu", threads=1).predict(text) == expected
    with pytest.raises(InputError, match="does not open ONNX"):
        compress.load("tiny", "litert").predict(text)


@pytest.mark.slow
@needs_export
def test_a_second_run_takes_all_stages_from_the_cache_in_silence(
    finished: Run, place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    again = compress.run(fields_of(place), artifacts=place / "artifacts")
    assert all(stage.cached for stage in again.report.stages)
    assert again.folder != finished.folder and again.recipe.name == "tiny"
    assert capfd.readouterr() == ("", "")
    compress.run(fields_of(place), artifacts=place / "artifacts", progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "onnx_int8: from the cache" in err


@pytest.mark.slow
def test_a_killed_process_continues_after_its_finished_stages(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(place / "tiny.yaml"), str(tmp_path)]
    process = subprocess.Popen(command, env=tiny_run.surroundings(), stdout=subprocess.DEVNULL, start_new_session=True)
    end = time.monotonic() + 200
    while not any("[2/3] onnx" in log.read_text() for log in tmp_path.glob("runs/tiny/*/run.log")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "runs" / "tiny" / "latest").exists()
    assert json.loads(python(RUN, place / "tiny.yaml", tmp_path).splitlines()[-1])["finetune"] is True
    assert (tmp_path / "runs" / "tiny" / "latest" / "report.json").is_file()
    assert load_report(tmp_path / "runs" / "tiny" / "latest" / "report.json").recipe == "tiny"
