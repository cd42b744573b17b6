"""`--json` writes one JSON value to standard output and nothing else; `python -m compress` is the same program."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_run


@pytest.fixture(scope="module")
def place(tiny_ran: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `compress run tiny.yaml` was called."""
    return shutil.copytree(tiny_ran, tmp_path_factory.mktemp("json") / "place", symlinks=True)


def answer(place: Path, *arguments: str) -> Any:
    """The JSON that a command writes."""
    done = tiny_run.compress(*arguments, "--json", folder=place, XDG_CACHE_HOME=str(place / "user-cache"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_check(place: Path) -> None:
    assert [stage["cached"] for stage in answer(place, "check", "tiny.yaml")["stages"]] == [True] * 3


def test_evaluate_gives_the_rows_of_the_report(place: Path) -> None:
    rows = {row["metric"]: row for row in answer(place, "evaluate", "tiny", "--threads", "1")}
    report = tiny_run.read_report(place / "artifacts")
    for metric in ("accuracy", "f1"):
        (expected_row,) = (row for row in report["measurements"] if (row["model"], row["metric"]) == ("final", metric))
        assert (rows[metric]["value"], rows[metric]["n"]) == (expected_row["value"], expected_row["n"])


@pytest.mark.slow
def test_bench_compares_two_artifacts(place: Path) -> None:
    bench_answer = answer(place, "bench", "artifacts/runs/tiny/latest", "--seconds", "0.1", "--baseline", "tiny")
    assert {row["model"] for row in bench_answer["measurements"]} == {"artifact", "baseline", "machine"}
    assert all(row["value"] > 0 for row in bench_answer["measurements"] if row["metric"] == "latency_ms")
    assert bench_answer["environment"]["cores_granted"] >= 1


def test_profile_adds_up_and_writes_its_page(place: Path) -> None:
    profile = answer(place, "profile", "tiny", "--seconds", "0.1", "--threads", "1", "--html", "page.html")
    views = (profile["nodes"], profile["by_operator"], profile["by_layer"])
    for figure in ("time_ms", "fp32_operations", "int8_operations", "weight_bytes", "limit_ms"):
        sums = [sum(row[figure] for row in rows) for rows in views]
        assert sums == pytest.approx([sums[0]] * 3) and sums[0] > 0
    assert profile["whole"]["int8_operations"] == pytest.approx(sum(row["int8_operations"] for row in profile["nodes"]))
    assert profile["operators_ms"] < profile["profiled_ms"]
    assert [row["uncounted_ms"] for row in profile["nodes"]] == [0.0] * len(profile["nodes"])
    assert "encoder.layer.0.attention" in [row["name"] for row in profile["by_layer"]]
    assert (place / "page.html").read_text().startswith("<!doctype html>")


def test_run_and_report(place: Path) -> None:
    report = tiny_run.read_report(place / "artifacts")
    assert json.loads((place / "said.json").read_text()) == answer(place, "report", "tiny") == report
    assert json.loads(tiny_run.compress_anew("report", "tiny", "--json", folder=place).stdout) == report


@pytest.mark.parametrize(
    "arguments", [("inspect", "model"), ("targets",), ("samples",), ("doctor",), ("recipes", "list", ".")]
)
def test_the_other_commands(place: Path, arguments: tuple[str, ...]) -> None:
    assert answer(place, *arguments)


def test_the_cache_is_listed_and_pruned(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "artifacts" / "cache", tmp_path / "artifacts" / "cache")
    left = tmp_path / "artifacts" / "cache" / ("partial-" + "0" * 64)
    (left / "content").mkdir(parents=True)
    (left / "content" / "half").write_bytes(b"x" * 1000)
    rows = answer(tmp_path, "cache")
    assert [row["name"] for row in rows][:3] == ["finetune", "onnx", "onnx_int8"]
    content = tmp_path / "artifacts" / "cache" / rows[0]["key"] / "content"
    assert rows[0]["bytes"] == sum(path.stat().st_size for path in content.rglob("*") if path.is_file())
    prune_answer = answer(tmp_path, "cache", "prune", "--older-than-days", "1")
    assert (prune_answer["removed"], prune_answer["freed_bytes"]) == ([], 1000)
    pruned = answer(tmp_path, "cache", "prune")
    assert (sorted(pruned["removed"]), pruned["in_use"]) == (sorted(row["key"] for row in rows), [])
    assert pruned["freed_bytes"] > sum(row["bytes"] for row in rows)
    assert answer(tmp_path, "cache") == []
