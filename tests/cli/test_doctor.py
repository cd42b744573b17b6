from __future__ import annotations

import json
import os
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from compress.cli.doctor import doctor
from compress.formats import runtimes
from compress.formats.registry import RUNTIMES
from compress.utils import environment, installation
from compress.utils.installation import RequiredPackage

Usage = namedtuple("Usage", "total used free")


def diagnose(*options: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(doctor)
    answer = CliRunner().invoke(app, list(options))
    return answer.exit_code, answer.stdout


def findings(level: str) -> dict[str, str | None]:
    _, text = diagnose("--json")
    return {f["what"]: f["advice"] for f in json.loads(text)["findings"] if f["level"] == level}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A machine with nothing to complain of."""
    described: dict[str, Any] = {
        **environment.environment(),
        "features": ["avx2", "avx512_vnni"],
        "cores_granted": 4,
        "cores_quota": None,
        "governor": "performance",
        "memory_bytes": 16_000_000_000,
        "memory_limit_bytes": None,
    }
    monkeypatch.setattr(environment, "environment", lambda: described)
    monkeypatch.setattr(environment, "features", lambda: tuple(described["features"]))
    monkeypatch.setattr(installation, "is_installed", lambda: True)
    monkeypatch.setattr(installation, "packages", lambda: [RequiredPackage("numpy", ">=2", "2.4.6")])
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, 10**12))
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.5, 0.5, 0.5))
    monkeypatch.chdir(tmp_path)
    return described


def test_a_good_machine_passes(machine: dict[str, Any]) -> None:
    assert diagnose("--json")[0] == 0
    assert findings("warning") == {}
    assert findings("problem") == {}


def test_a_wrong_package_fails_with_the_command_that_mends_it(
    machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [RequiredPackage("torch", ">=2.13", "2.1.0"), RequiredPackage("onnx", ">=1.23", None)]
    monkeypatch.setattr(installation, "packages", lambda: wrong)
    assert findings("problem") == {
        "torch >=2.13 is needed, 2.1.0 is installed": "pip install 'torch>=2.13'",
        "onnx >=1.23 is needed, it is missing": "pip install 'onnx>=1.23'",
    }
    code, text = diagnose()
    assert code == 1
    assert "PROBLEM  torch >=2.13 is needed, 2.1.0 is installed\n" in text
    assert "-> pip install 'torch>=2.13'\n" in text


def test_a_missing_extra_is_no_failure(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "packages", lambda: [RequiredPackage("tensorrt", "", None, "gpu")])
    assert diagnose()[0] == 0
    assert findings("ok")["extra gpu: not installed (lacks tensorrt)"] == "pip install 'compress[gpu]'"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": ["avx2"]}, "lacks VNNI"),
        ({"cores_quota": 1.5}, "the time of 1.5 cores only"),
        ({"governor": "powersave"}, "'powersave'"),
        ({"memory_limit_bytes": 2_000_000_000}, "2.0 GB of memory is little"),
    ],
)
def test_what_spoils_a_run_is_warned_of(machine: dict[str, Any], change: dict[str, Any], words: str) -> None:
    machine.update(change)
    (what,) = findings("warning")
    assert words in what
    assert diagnose()[0] == 0


def test_load_and_disk_are_warned_of(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (4.5, 1.0, 1.0))
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, 10**9))
    assert list(findings("warning")) == [
        "the load is 4.5 on 4 cores",
        "1.0 GB free on the disk of the current folder, which is little",
    ]


def test_a_missing_runtime_is_a_problem(machine: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = replace(RUNTIMES["onnxruntime"], runtime="compress.formats.no_such_module:RUNTIME")
    monkeypatch.setattr(runtimes, "RUNTIMES", {**RUNTIMES, "onnxruntime": lacking})
    (what,) = findings("problem")
    assert what.startswith("target cpu: the runtime 'onnxruntime' cannot be imported")
