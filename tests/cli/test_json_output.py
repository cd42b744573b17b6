"""Tests of `--json` of all commands: standard output is one JSON value, compared with the run's report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run


@pytest.fixture(scope="module")
def recipe_folder(tiny_ran: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which `compress run tiny.yaml` was called."""
    return shutil.copytree(tiny_ran, tmp_path_factory.mktemp("json") / "place", symlinks=True)


def json_of(recipe_folder: Path, *arguments: str) -> Any:
    """Run a command with `--json` and return its parsed output."""
    done = tiny_run.compress(
        *arguments, "--json", folder=recipe_folder, XDG_CACHE_HOME=str(recipe_folder / "user-cache")
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_check_reports_cached_stages(recipe_folder: Path) -> None:
    assert [stage["cached"] for stage in json_of(recipe_folder, "check", "tiny.yaml")["stages"]] == [True] * 3


def test_evaluate_repeats_metrics_of_report(recipe_folder: Path) -> None:
    rows = {row["metric"]: row for row in json_of(recipe_folder, "evaluate", "tiny", "--threads", "1")}
    report = tiny_run.read_report(recipe_folder / "artifacts")
    for metric in ("accuracy", "f1"):
        (expected_row,) = (row for row in report["measurements"] if (row["model"], row["metric"]) == ("final", metric))
        assert (rows[metric]["value"], rows[metric]["n"]) == (expected_row["value"], expected_row["n"])


@pytest.mark.slow
def test_bench_compares_two_artifacts(recipe_folder: Path) -> None:
    benchmark_result = json_of(
        recipe_folder, "bench", "artifacts/runs/tiny/latest", "--seconds", "0.1", "--baseline", "tiny"
    )
    assert {row["model"] for row in benchmark_result["measurements"]} == {"artifact", "baseline", "machine"}
    assert all(row["value"] > 0 for row in benchmark_result["measurements"] if row["metric"] == "latency_ms")
    assert benchmark_result["environment"]["cores_granted"] >= 1


def test_profile_sums_are_consistent_and_page_is_written(recipe_folder: Path) -> None:
    profile = json_of(recipe_folder, "profile", "tiny", "--seconds", "0.1", "--threads", "1", "--html", "page.html")
    views = (profile["nodes"], profile["by_operator"], profile["by_layer"])
    for figure in ("time_ms", "fp32_operations", "int8_operations", "weight_bytes", "limit_ms"):
        sums = [sum(row[figure] for row in rows) for rows in views]
        assert sums == pytest.approx([sums[0]] * 3) and sums[0] > 0
    assert profile["whole"]["int8_operations"] == pytest.approx(sum(row["int8_operations"] for row in profile["nodes"]))
    assert profile["operators_ms"] < profile["profiled_ms"]
    assert [row["uncounted_ms"] for row in profile["nodes"]] == [0.0] * len(profile["nodes"])
    assert "encoder.layer.0.attention" in [row["name"] for row in profile["by_layer"]]
    assert (recipe_folder / "page.html").read_text().startswith("<!doctype html>")


def test_run_and_report_print_the_same_json(recipe_folder: Path) -> None:
    report = tiny_run.read_report(recipe_folder / "artifacts")
    assert json.loads((recipe_folder / "said.json").read_text()) == json_of(recipe_folder, "report", "tiny") == report
    assert json.loads(tiny_run.compress_anew("report", "tiny", "--json", folder=recipe_folder).stdout) == report


@pytest.mark.parametrize(
    "arguments", [("inspect", "model"), ("targets",), ("samples",), ("doctor",), ("recipes", "list", ".")]
)
def test_other_commands_print_json(recipe_folder: Path, arguments: tuple[str, ...]) -> None:
    assert json_of(recipe_folder, *arguments)


def test_cache_is_listed_and_pruned(recipe_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(recipe_folder / "artifacts" / "cache", tmp_path / "artifacts" / "cache")
    left = tmp_path / "artifacts" / "cache" / ("partial-" + "0" * 64)
    (left / "content").mkdir(parents=True)
    (left / "content" / "half").write_bytes(b"x" * 1000)
    rows = json_of(tmp_path, "cache")
    assert [row["name"] for row in rows][:3] == ["finetune", "onnx", "onnx_int8"]
    content = tmp_path / "artifacts" / "cache" / rows[0]["key"] / "content"
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in content.rglob("*") if path.is_file())
    prune_result = json_of(tmp_path, "cache", "prune", "--older-than-days", "1")
    assert (prune_result["removed"], prune_result["freed_bytes"]) == ([], 1000)
    pruned = json_of(tmp_path, "cache", "prune")
    assert (sorted(pruned["removed"]), pruned["in_use"]) == (sorted(row["key"] for row in rows), [])
    assert pruned["freed_bytes"] > sum(row["bytes"] for row in rows)
    assert json_of(tmp_path, "cache") == []
