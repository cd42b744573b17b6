"""Tests of the modules that commands import: heavy libraries are not imported where they are not needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_run

import compress

HEAVY = (
    "torch",
    "transformers",
    "onnx",
    "datasets",
    "accelerate",
    "nncf",
    "optimum",
    "executorch",
    "torchao",
    "coremltools",
)
PROBE = """
import json, sys
from compress.cli import main
sys.argv = ["compress", *sys.argv[1:]]
try:
    main()
finally:
    print(json.dumps(sorted(name for name in sys.modules if "." not in name)), file=sys.stderr)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a recipe with its model and data, and return the recipe's path."""
    return tiny_run.write_all(tmp_path_factory.mktemp("place"))


def imported(*arguments: str | Path) -> set[str]:
    """Run a command in a new process, which must exit with 0, and return the top-level modules it imported."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("run", "--help"), ("samples",), ("recipes",)])
def test_light_commands_import_no_heavy_library(arguments: tuple[str, ...], recipe: Path) -> None:
    folder = ("list", str(recipe.parent)) if arguments == ("recipes",) else ()
    modules = imported(*arguments, *folder)
    assert modules.isdisjoint((*HEAVY, "onnxruntime", "pyarrow", "numpy")), modules


def test_check_with_cache_imports_no_heavy_library(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    modules = imported("check", recipe, "--artifacts", tmp_path)
    assert modules.isdisjoint(HEAVY), modules
    assert "pyarrow" in modules, "the data's digest is part of the keys"


def test_unrelated_distribution_of_the_same_name_is_named_in_one_line(tmp_path: Path) -> None:
    """Both distributions install a package `compress` into one folder, so that either may be broken."""
    folder = tmp_path / "compress-0.1.1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: compress\nVersion: 0.1.1\n")
    command = [sys.executable, "-m", "compress", "--version"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == compress.__version__
    (line,) = done.stderr.splitlines()
    assert "unrelated package `compress`" in line and "pip install --force-reinstall compress-models" in line
