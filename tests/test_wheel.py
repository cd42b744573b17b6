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
    """Return a function that runs commands of an installed wheel in an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source, installed, empty = folder / "source", folder / "installed", folder / "empty"
    empty.mkdir()
    # A clean copy, since setuptools also packs what an earlier build left in `build`.
    source.mkdir()
    for name in ("compress", "recipes"):
        skipped = shutil.ignore_patterns("__pycache__", "shipped_recipes")
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    (source / "compress" / "shipped_recipes").symlink_to("../recipes")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target", installed]
    subprocess.run([*pip, source], check=True)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "compress", *arguments]
        env = os.environ | {"PYTHONPATH": str(installed)}
        return subprocess.run(command, cwd=empty, env=env, capture_output=True, text=True, check=False)

    return run


@pytest.mark.slow
def test_wheel_lists_copies_and_checks_its_recipes(compress: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    rows = json.loads(compress("recipes", "--json").stdout)
    assert {row["name"] for row in rows} == {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert not any(row["problems"] for row in rows)
    assert all("installed" in row["path"] and str(ROOT) not in row["path"] for row in rows)
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
