"""The wheel works without a checkout: commands, shipped recipes and the catalogue of samples."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def compress(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs commands of the wheel, installed in an empty environment, in an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source, venv, empty = folder / "source", folder / "venv", folder / "empty"
    empty.mkdir()
    # A clean copy, since setuptools also packs what an earlier build left in `build`.
    source.mkdir()
    for name in ("compress", "recipes"):
        skipped = shutil.ignore_patterns("__pycache__", "shipped_recipes")
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    (source / "compress" / "shipped_recipes").symlink_to("../recipes")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "dist"]
    subprocess.run([*build, source], check=True)
    shutil.rmtree(source)
    (wheel,) = (folder / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    install = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--no-compile", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, wheel], check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [venv / "bin" / "compress", *arguments]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_wheel_lists_copies_and_checks_its_recipes(compress: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    rows = json.loads(compress("recipes", "--json").stdout)
    assert {row["name"] for row in rows} == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert not any(row["problems"] for row in rows)
    assert all("site-packages" in row["path"] and str(ROOT) not in row["path"] for row in rows)
    copied = compress("recipes", "copy", "fashion-vit-qat", "--json")
    assert {"fashion-vit-qat.yaml", "fashion-vit"} <= set(json.loads(copied.stdout)), copied.stderr
    checked = compress("check", "quickstart", "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["recipe"] == "quickstart"


@pytest.mark.slow
def test_wheel_knows_all_samples(compress: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    from compress_samples.catalog import SAMPLES

    listed = json.loads(compress("samples", "--json").stdout)
    assert {sample["name"] for sample in listed} == {sample.name for sample in SAMPLES}


@pytest.mark.slow
def test_wheel_alone_runs_the_quickstart_to_its_report(
    compress: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    # A few steps of training, so that the limits are missed: what ships and what is measured is the same.
    changes = ("finetune.epochs=0.05", "distill.epochs=0.05", "benchmark.seconds=0.5", "targets=[cpu]")
    changes += ("data.unlabeled=[]", "distill.use_unlabeled=false", "trim_vocabulary.use_unlabeled=false")
    short = [part for change in changes for part in ("--set", change)]
    finished = compress("run", "quickstart", "--artifacts", str(tmp_path), *short)
    assert finished.returncode in (0, 1), finished.stderr
    folder = tmp_path / "runs" / "quickstart" / "latest"
    report = json.loads((folder / "report.json").read_text())
    assert {limit["metric"] for limit in report["limits"]} == {"accuracy", "size_bytes", "speedup"}
    assert "quickstart" in (folder / "report.html").read_text()
    size_limit = next(limit for limit in report["limits"] if limit["metric"] == "size_bytes")
    assert size_limit["passed"]
