#!/usr/bin/env python3
"""Show that the project works without a plug-in: copy the tree, delete the plug-in with its tests, and check the copy.

Usage: `plugin_rotation.py [NAME ...]`. Without names, one plug-in is taken, a different one each day; with
ROTATION=all in the environment, all are taken in turn. Exit code 1: a check failed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLUGINS = ROOT / "compress" / "plugins"
QUICK_TESTS = (
    "tests/test_imports.py",
    "tests/test_plugins.py",
    "tests/cli/test_start_up.py",
    "tests/pipeline/test_cache.py",
    "tests/pipeline/test_licences.py",
    "tests/pipeline/test_plan.py",
    "tests/recipe/test_recipe_source.py",
    "tests/recipe/test_recipe_targets.py",
    "tests/report/test_schema.py",
    "tests/report/test_views.py",
    "tests/tasks/test_registry.py",
)
"""Folders and files of quick tests of the core, which take under two minutes together."""
IMPORTS = """
import importlib, pkgutil, sys
import compress
from compress.plugins import installed_plugins, plugin_problems, read_specs

disabled = [f"compress.plugins.{name}" for name in read_specs().keys() - installed_plugins().keys()]
failed = []
for module in pkgutil.walk_packages(compress.__path__, "compress."):
    if module.name == "compress.__main__" or any(f"{module.name}.".startswith(f"{name}.") for name in disabled):
        continue
    try:
        importlib.import_module(module.name)
    except Exception as error:
        failed.append(f"{module.name}: {type(error).__name__}: {error}")
expected = [problem for problem in plugin_problems() if "requires the plug-in" not in problem.reason]
sys.exit("\\n".join(map(str, [*failed, *expected])) or 0)
"""
COMMANDS = """
import json, sys
import typer
from compress.cli import app
from compress.plugins import CATALOGUE, installed_plugins

group = typer.main.get_command(app)
catalogue = json.loads(CATALOGUE.read_text())["commands"]
expected = {name for name, plugin in catalogue.items() if plugin in installed_plugins()}
listed = set(group.commands) & set(catalogue)
if listed != expected:
    sys.exit(f"the commands {sorted(listed)} are listed, expected {sorted(expected)}")
for name in group.commands:
    group.resolve_command(typer.Context(group), [name])
"""
RECIPES = """
import sys
from pathlib import Path
from compress.pipeline.planning import make_plan
from compress.plugins import installed_plugins, read_specs
from compress.recipe.loading import read_recipe
from compress.utils.errors import CompressError, SampleError

deleted, failed = sys.argv[1], []
recipes = sorted(Path("recipes").glob("*.yaml"))
for path in recipes:
    try:
        recipe = read_recipe(path)
        make_plan(recipe, path.parent, lambda label, data: False, Path("artifacts"), looks_into_model=False)
    except SampleError:
        pass  # the recipe is valid, and its data are not on this machine
    except CompressError as error:
        message = " ".join(str(error).split())
        if f"the plug-in {deleted}, which provides" not in message and "There is no model" not in message:
            failed.append(f"{path}: {error}")
sys.exit("\\n".join(failed) or 0)
"""


def chosen_plugins(names: list[str]) -> list[str]:
    """Return the plug-ins to delete, one after the other."""
    plugins = sorted(folder.parent.name for folder in PLUGINS.glob("*/__init__.py"))
    if unknown := set(names) - set(plugins):
        sys.exit(f"no plug-in {', '.join(sorted(unknown))}; expected one of {', '.join(plugins)}")
    if names or os.environ.get("ROTATION") == "all":
        return names or plugins
    return [plugins[datetime.now(UTC).date().toordinal() % len(plugins)]]


def copy_without(plugin: str, folder: Path) -> None:
    """Copy all files that git knows or would add, without the plug-in and its tests."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    deleted = (f"compress/plugins/{plugin}/", f"tests/plugins/{plugin}/")
    for name in listed.split("\0"):
        source = ROOT / name
        if name and source.is_file() and not name.startswith((*deleted, "benchmarks/results/")):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def check(plugin: str) -> bool:
    """Run all checks without a plug-in, print a line for each, and return whether all passed."""
    python = [sys.executable]
    with tempfile.TemporaryDirectory(prefix="compress-without-") as scratch:
        folder = Path(scratch)
        copy_without(plugin, folder)
        steps = {
            "imports": [*python, "-c", IMPORTS],
            "help": [*python, "-m", "compress", "--help"],
            "commands": [*python, "-c", COMMANDS],
            "recipes": [*python, "-c", RECIPES, plugin],
            "import contracts": [str(Path(sys.executable).with_name("lint-imports"))],
            "quick tests": [
                *(*python, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--durations=5", *QUICK_TESTS),
                *("-m", "not slow and not browser and not alone"),
            ],
        }
        results = [run(plugin, name, command, folder) for name, command in steps.items()]
        return all(results)


def run(plugin: str, name: str, command: list[str], folder: Path) -> bool:
    """Run one check in the copy and print its name, result and time, and its output if it failed."""
    # The copy must come before the editable installation of this checkout.
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    result = "passed" if done.returncode == 0 else "FAILED"
    sys.stdout.write(f"without {plugin}: {name}: {result} in {seconds:.0f} s\n")
    if done.returncode != 0:
        sys.stdout.write(f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}\n")
    sys.stdout.flush()
    return done.returncode == 0


if __name__ == "__main__":
    passed = [check(plugin) for plugin in chosen_plugins(sys.argv[1:])]
    sys.exit(0 if all(passed) else 1)
