"""Tests of `compress report`: its formats, compared with the files of the run."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from command_line import invoke, output_of

from compress.report.pages import write_report
from compress.report.run_folder import find_report, unfinished_run, update_latest_link
from compress.results.report import LimitResult, Measurement, Report
from compress.utils.errors import InputError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = (Measurement(model="final", metric="accuracy", target="cpu", value=0.875, unit="ratio", n=8),)
    limits = (LimitResult(metric="accuracy", target="cpu", limit=">= 90%", value=0.875, passed=False),)
    write_report(Report(recipe="r\u00e9sum\u00e9", measurements=rows, limits=limits), tmp_path)
    return tmp_path


def test_json_output_equals_report_file(run: Path) -> None:
    whole = (run / "report.json").read_text(encoding="utf-8")
    assert output_of("report", run, "--json") == output_of("report", run, "--format", "json") == whole
    assert json.loads(whole)["schema"] == 1


def test_report_is_rendered_in_each_format(run: Path) -> None:
    assert output_of("report", run, "--format", "html").startswith("<!doctype html>")
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert output_of("report", run / "report.json", "--format", "markdown") == markdown
    assert ElementTree.fromstring(output_of("report", run, "--format", "junit")).get("failures") == "1"
    assert "87.50%" in output_of("report", run)


def test_interrupted_run_is_named_with_the_way_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "artifacts/runs/tiny"
    (runs / "2026-12-01T10-00-00").mkdir(parents=True)
    with pytest.raises(InputError, match="The run of tiny has no report yet") as caught:
        find_report(Path("tiny.yaml"))
    assert "repeat the same `compress run`" in (caught.value.hint or "")
    # An earlier report is shown, with a note about the later run.
    (runs / "2026-11-30T10-00-00").mkdir()
    write_report(Report(recipe="tiny"), runs / "2026-11-30T10-00-00")
    update_latest_link(runs / "2026-11-30T10-00-00")
    assert find_report(Path("tiny")).parent.resolve().name == "2026-11-30T10-00-00"
    assert "A later run has no report" in invoke("report", "tiny").stderr
    write_report(Report(recipe="tiny"), runs / "2026-12-01T10-00-00")
    assert unfinished_run(Path("tiny")) is None
