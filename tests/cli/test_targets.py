from __future__ import annotations

import json

import onnxruntime
import typer
from typer.testing import CliRunner

from compress.cli.targets import targets
from compress.targets import TARGETS


def list_targets(*options: str) -> str:
    app = typer.Typer()
    app.command()(targets)
    answer = CliRunner().invoke(app, list(options))
    assert answer.exit_code == 0
    return answer.stdout


def test_every_target_is_available_or_says_why_not() -> None:
    rows = json.loads(list_targets("--json"))
    assert [row["name"] for row in rows] == list(TARGETS)
    assert all(row["available"] == (row["reason"] is None) for row in rows)
    for row in rows:
        if row["runtime"] == "onnxruntime" and row["provider"] not in onnxruntime.get_available_providers():
            assert f"has no {row['provider']}" in row["reason"]
    assert rows[0] == {
        "name": "cpu",
        "description": TARGETS["cpu"].description,
        "runtime": "onnxruntime",
        "provider": "CPUExecutionProvider",
        "formats": ["onnx"],
        "threads": None,
        "max_bytes": None,
        "max_memory_bytes": None,
        "measured_instead_of": None,
        "app_runtime": None,
        "available": True,
        "reason": None,
    }


def test_the_list_reads_as_text() -> None:
    text = list_targets()
    width = max(map(len, TARGETS))
    assert f"{'cpu':<{width}}  ONNX Runtime on this machine's processor; onnx\n{'':<{width}}  available\n" in text
    assert "measured on this machine instead of an Android phone\n" in text


def test_what_a_phone_runs_is_told_from_what_runs_it_here() -> None:
    rows = {row["name"]: row for row in json.loads(list_targets("--json"))}
    android = rows["android"]
    assert (android["runtime"], android["formats"]) == ("onnxruntime", ["onnx", "ort", "litert"])
    assert android["app_runtime"] == "Maven: com.microsoft.onnxruntime:onnxruntime-android"
    assert android["measured_instead_of"] == "an Android phone" and rows["desktop"]["measured_instead_of"] is None
