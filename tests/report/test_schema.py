"""Tests of report files: schema, reading, writing and lookup of runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from compress.report.pages import write_report
from compress.report.run_folder import find_report, write_atomically
from compress.results.report import Measurement, Report, StageRecord, load_report
from compress.utils.errors import InputError, StorageError


def test_report_file_has_the_keys_of_schema_1(report: Report) -> None:
    content = json.loads(report.to_json())
    assert content["schema"] == 1
    assert {"recipe", "environment", "stages", "measurements", "limits", "skipped"} <= set(content)
    assert set(content["stages"][0]) == {
        "name", "key", "cached", "seconds", "check_seconds", "peak_rss_bytes", "remarks", "tables"
    }  # fmt: skip
    assert set(content["measurements"][0]) == {
        "model", "metric", "target", "value", "unit", "low", "high", "n", "raw"
    }  # fmt: skip
    assert {"metric", "target", "limit", "value", "passed"} <= set(content["limits"][0])
    reason = "ONNX Runtime has no CUDAExecutionProvider here"
    assert content["skipped"] == [{"target": "gpu", "reason": reason, "failed": False}]


def test_written_report_reads_back_equal(report: Report, tmp_path: Path) -> None:
    write_report(report, tmp_path / "run")
    assert load_report(tmp_path / "run" / "report.json") == report
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["report.html", "report.json", "report.md"]


def test_values_that_are_not_numbers_stay_valid_json(tmp_path: Path) -> None:
    rows = (
        Measurement(model="final", metric="perplexity", target="cpu", value=math.inf, unit=""),
        Measurement(model="final", metric="loss", target="cpu", value=math.nan, unit=""),
    )
    write_report(Report(recipe="r", measurements=rows), tmp_path)
    text = (tmp_path / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    values = [row.value for row in load_report(tmp_path / "report.json").measurements]
    assert values[0] == math.inf
    assert math.isnan(values[1])


def test_models_are_in_the_order_of_the_run() -> None:
    names = ("final", "quantize", "baseline", "distill")
    rows = [Measurement(model=name, metric="m", target="cpu", value=1, unit="") for name in names]
    stages = [StageRecord(name=name, key="k", cached=False, seconds=1) for name in ("distill", "quantize")]
    report = Report(recipe="r", measurements=tuple(rows), stages=tuple(stages))
    assert report.models == ("baseline", "distill", "quantize", "final")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "names no schema"),
        ("{}", "names no schema"),
        ('{"schema": 2, "recipe": "r"}', "schema 2, which is newer"),
        ('{"schema": "one", "recipe": "r"}', "schema"),
        ('{"schema": 0, "recipe": "r"}', "schema"),
        ('{"schema": 1}', "recipe: Field required"),
        ('{"schema": 1, "recipe": "r", "stages": [{"name": "x"}]}', "stages.0.key: Field required"),
    ],
)
def test_invalid_reports_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message.replace(".", r"\.")) as caught:
        load_report(path)
    assert caught.value.where == str(path)


def test_a_missing_or_binary_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no report here"):
        load_report(tmp_path / "report.json")
    (tmp_path / "report.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        load_report(tmp_path / "report.json")


def test_unknown_keys_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"schema": 1, "recipe": "r", "energy": 3}')
    assert load_report(tmp_path / "report.json") == Report(recipe="r")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("old")

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_atomically(tmp_path / "report.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "old"


def test_a_run_is_found_by_folder_file_and_recipe_name(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    run = runs / "quickstart" / "2026-11-25T12-00-00"
    write_report(Report(recipe="quickstart"), run)
    (runs / "quickstart" / "latest").symlink_to(run.name)
    report = run / "report.json"
    for reference in (run, report, runs / "quickstart", Path("quickstart"), Path("recipes/quickstart.yaml")):
        assert find_report(reference, runs).resolve() == report
    with pytest.raises(InputError, match="no report of 'quickstrat'") as caught:
        find_report(Path("quickstrat"), runs)
    assert "name one of: quickstart" in (caught.value.hint or "")


def test_measurement_is_found_by_metric_and_a_misspelt_name_is_corrected(report: Report) -> None:
    assert report.measurement("accuracy") == report.find("final", "accuracy", "cpu")
    assert report.measurement("size_bytes", "baseline", "cpu") == report.find("baseline", "size_bytes", "cpu")
    with pytest.raises(InputError, match=r"'acuracy'.*Did you mean 'accuracy'"):
        report.measurement("acuracy")
    with pytest.raises(InputError, match=r"'finl'.*Did you mean 'final'"):
        report.measurement("accuracy", "finl")
    with pytest.raises(InputError, match="on 'gpus'"):
        report.measurement("accuracy", target="gpus")


def test_representations_are_short(report: Report) -> None:
    row = report.measurement("accuracy").model_copy(update={"raw": (1.0,) * 2000})
    assert len(repr(report)) < 300 and len(repr(row)) < 300
