"""`compress registry` as a user calls it: two runs, a promotion, a bad one, the way back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from registry import made_run
from typer.testing import CliRunner, Result

from compress.cli import app
from compress.plugins.registry.registry import Registry
from compress.utils.errors import CompressError, InputError


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["registry", *map(str, arguments)])


def answer(*arguments: str | Path, code: int = 0) -> Any:
    """The JSON that a command writes."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a good run and a bad one."""
    monkeypatch.chdir(tmp_path)
    made_run(tmp_path / "good", b"good")
    made_run(tmp_path / "bad", b"bad", accuracy=0.5)
    return tmp_path


def test_a_night_goes_wrong_and_the_way_back(place: Path) -> None:
    first = answer("register", "good", "--name", "reviews", "--note", "Monday's")
    assert (first["version"], first["new"], first["note"]) == (1, True, "Monday's")
    assert not answer("register", "good", "--name", "reviews")["new"]
    assert answer("promote", "reviews@1")["gate"] == {"against": None, "status": "not compared", "failed": []}
    answer("register", "bad", "--name", "reviews")
    refused = answer("promote", "reviews@2", code=1)
    assert refused["refused"] and refused["gate"]["status"] == "failed"
    assert {row["status"] for row in refused["judgements"] if row["metric"] == "accuracy"} == {"failed"}
    assert answer("aliases") == {"reviews": {"champion": 1}}
    forced = answer("promote", "reviews@2", "--force", "--why", "for a demonstration")
    assert not forced["refused"] and answer("aliases", "reviews") == {"reviews": {"champion": 2}}
    assert answer("rollback", "reviews", "--why", "it was only one")["version"] == 1
    assert [row["aliases"] for row in answer("list")] == [["champion"], []]
    shown = answer("show", "reviews@2")
    assert [entry["kind"] for entry in shown["history"]] == ["registered", "promoted"]
    assert shown["history"][1]["forced"] and shown["history"][1]["why"] == "for a demonstration"
    assert {row["metric"]: row["value"] for row in shown["measurements"]} == {"accuracy": 0.5, "size_bytes": 1000.0}
    assert [entry["kind"] for entry in answer("history")] == [
        "began", "registered", "promoted", "registered", "promoted", "rolled back",
    ]  # fmt: skip
    assert answer("pull", "reviews@champion", "-o", "served")["version"] == 1
    assert (place / "served" / "model" / "onnx" / "model.onnx").read_bytes() == b"good"
    assert answer("push", "far")["entries"] == 6
    assert answer("fetch", "far", "--registry", "other")["entries"] == 6
    assert answer("verify", "--remote", "far") == {"sound": True, "faults": []}
    assert answer("retire", "reviews@2", "--why", "bad")["retired"]
    planned = answer("gc", "--dry-run")
    assert planned["versions"] == ["reviews@2"] and len(planned["objects"]) == 3
    assert answer("gc")["objects"] == planned["objects"]
    assert answer("verify") == {"sound": True, "faults": []}
    log = place / "artifacts" / "registry" / "log"
    log.write_bytes(log.read_bytes() + b"torn")
    assert [fault["path"] for fault in answer("verify", code=1)["faults"]] == ["log"]


def test_what_people_read(place: Path) -> None:
    for command in (
        ("register", "good", "--name", "reviews"),
        ("promote", "reviews@1"),
        ("register", "bad", "--name", "reviews"),
    ):
        assert invoke(*command).exit_code == 0
    refused = invoke("promote", "reviews@2")
    assert refused.exit_code == 1
    assert "reviews@2 is not made the champion, compared with reviews@1: failed" in refused.stdout
    assert "90.00% → 50.00%" in refused.stdout and "--force --why" in refused.stderr
    assert invoke("aliases").stdout == "reviews@champion = reviews@1\n"
    assert "Accuracy 90.00%" in invoke("show", "reviews@champion").stdout
    assert "registered reviews@2" in invoke("history", "reviews").stdout
    listed = invoke("list").stdout
    assert "reviews@1" in listed and "champion" in listed
    nothing = invoke("rollback", "reviews").exception
    assert isinstance(nothing, InputError) and "nothing to go back to" in str(nothing)
    unknown = invoke("show", "reviews@champio").exception
    assert isinstance(unknown, CompressError) and "'champion'" in str(unknown)


def test_a_registry_imports_no_torch(tmp_path: Path) -> None:
    made_run(tmp_path / "run", b"weights")
    root = tmp_path / "registry"
    Registry(root).register(tmp_path / "run", "reviews")
    code = """
import sys
from compress.cli import main
sys.argv = ["compress", *sys.argv[1:]]
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""
    arguments = ("registry", "promote", "reviews@1", "--registry", str(root))
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    modules = set(done.stderr.splitlines()[-1].split())
    assert "compress.plugins.registry.promotion" in modules
    assert modules.isdisjoint(("torch", "transformers", "onnx", "onnxruntime", "fsspec", "mlflow"))
