"""Tests of the discovery of plug-ins and of what is recorded about those that cannot be used.

`tests/third_party` holds a whole package that extends compress.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import tiny_run

from compress import plugins
from compress.plugins import (
    API_VERSION,
    EXTENSION_POINTS,
    UnusablePluginError,
    find_extensions,
    load_extension,
    load_extensions,
    plugin_problems,
    read_specs,
)

ROOT = Path(__file__).parents[1]
MODULE = """
GOOD = "good"
TWIN = "good"
TAKEN = "cast"
LACKING = ""
"""


@pytest.fixture(autouse=True)
def no_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins.installed_plugins()
    monkeypatch.setattr(plugins, "_problems", {})


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Return pairs of entry point name and object in the stages group; the test fills the list."""
    (tmp_path / "plugged.py").write_text(MODULE)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no such luck')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pairs: list[tuple[str, str]] = []

    def entry_points(group: str) -> EntryPoints:
        return EntryPoints(EntryPoint(name, value, group) for name, value in pairs if group == "compress.stages")

    monkeypatch.setattr(plugins, "entry_points", entry_points)
    monkeypatch.setattr(plugins, "_discover", dict)  # the project's own plug-ins register stages too
    yield pairs


def accept(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise UnusablePluginError("it has no letters; expected a word")
    return value


def load() -> dict[str, str]:
    return load_extensions("stages", ["cast"], accept, lambda value: value)


def test_an_object_is_listed_under_its_own_name(registered: list[tuple[str, str]]) -> None:
    registered.append(("whatever", "plugged:GOOD"))
    assert load() == {"good": "good"}
    assert plugin_problems() == ()


@pytest.mark.parametrize(
    ("value", "provider", "reason"),
    [
        ("broken_plugin:X", "broken_plugin", "RuntimeError: no such luck"),
        ("not_there:X", "not_there", "ModuleNotFoundError"),
        ("plugged:NOT_THERE", "plugged", "AttributeError"),
        ("plugged:LACKING", "plugged", "it has no letters; expected a word"),
        ("plugged:TAKEN", "plugged", "built in"),
    ],
)
def test_an_unusable_object_is_named_with_its_package_and_the_others_work(
    value: str, provider: str, reason: str, registered: list[tuple[str, str]]
) -> None:
    registered += [("bad", value), ("fine", "plugged:GOOD")]
    assert load() == {"good": "good"}
    (problem,) = plugin_problems()
    assert (problem.point, problem.provider) == ("stages", f"the package {provider}")
    assert reason in str(problem) and provider in str(problem)


def test_the_second_of_two_objects_with_one_name_is_left_out(registered: list[tuple[str, str]]) -> None:
    registered += [("first", "plugged:GOOD"), ("second", "plugged:TWIN")]
    assert load() == {"good": "good"}
    (problem,) = plugin_problems()
    assert "plugged registers the same name" in problem.reason


def test_names_are_found_before_anything_is_imported(registered: list[tuple[str, str]]) -> None:
    registered += [("bad", "broken_plugin:X"), ("cast", "plugged:GOOD")]
    extensions = find_extensions("stages", ["cast"])
    assert list(extensions) == ["bad"]
    assert [problem.name for problem in plugin_problems()] == ["cast"]
    assert load_extension(extensions["bad"], accept) is None
    assert [problem.name for problem in plugin_problems()] == ["bad", "cast"]


SPECS = {
    # A package whose plug-in can be used, and which adds a command.
    "good": """
from compress.plugins import Command, PluginSpec
SPEC = PluginSpec(name="good", summary="Greets.", commands={"greet": Command("good:greet", "Greet.")})
def greet() -> None:
    print("hello")
""",
    # The same command once more, and one of the core.
    "twin": """
from compress.plugins import Command, PluginSpec
COMMANDS = {"greet": Command("twin:greet", "Greet."), "run": Command("twin:greet", "Run.")}
SPEC = PluginSpec(name="twin", summary="Greets too.", commands=COMMANDS)
""",
    "broken": "raise RuntimeError('no such luck')\n",
    "lonely": """
from compress.plugins import PluginSpec
SPEC = PluginSpec(name="lonely", summary="Needs another.", requires=("absent",))
""",
    "dependent": """
from compress.plugins import PluginSpec
SPEC = PluginSpec(name="dependent", summary="Needs one that is disabled.", requires=("lonely",))
""",
    "outdated": """
from compress.plugins import PluginSpec
SPEC = PluginSpec(name="outdated", summary="Old.", api_version=0)
""",
    "halfway": """
from compress.plugins import Command, PluginSpec
SPEC = PluginSpec(
    name="halfway",
    summary="Its objects cannot be imported.",
    commands={"fail": Command("nowhere_at_all:fail", "Fail.")},
    stages={"missing_stage": "nowhere_at_all:Stage"},
)
""",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of installed packages: one distribution that registers all of `SPECS`."""
    folder = tmp_path_factory.mktemp("site")
    for name, code in SPECS.items():
        (folder / f"{name}.py").write_text(code)
    metadata = folder / "more_plugins-1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: more-plugins\nVersion: 1.2\n")
    entries = [f"{name} = {name}:SPEC" for name in SPECS]
    (metadata / "entry_points.txt").write_text("\n".join(["[compress.plugins]", *entries]))
    return folder


def call(site: Path, *arguments: object, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command beside the packages of ``site``, with the copy of compress in ``folder``."""
    path = os.pathsep.join(map(str, (folder or ROOT, site)))
    return subprocess.run(
        [sys.executable, "-m", "compress", *map(str, arguments)],
        **{"capture_output": True, "text": True, "check": False, "timeout": 120},
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        cwd=site,
    )


def problems(site: Path) -> list[str]:
    code = "from compress.cli import app; import typer; typer.main.get_command(app); from compress import plugins; "
    code += "print(*plugins.plugin_problems(), sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        **{"capture_output": True, "text": True, "check": True, "timeout": 120},
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, site)))},
        cwd=site,
    )
    return done.stdout.splitlines()


def test_unusable_plugins_are_named_with_their_package_and_reason(site: Path) -> None:
    of = "of the package more-plugins 1.2 is left out: "
    # A plug-in of the project may be disabled too, if this copy lacks one that it requires.
    assert [line for line in problems(site) if "more-plugins" in line] == [
        f"The plug-in 'broken' {of}it cannot be imported: RuntimeError: no such luck",
        f"The plug-in 'dependent' {of}it requires the plug-in lonely, which is missing or cannot be used",
        f"The plug-in 'lonely' {of}it requires the plug-in absent, which is missing or cannot be used",
        f"The plug-in 'outdated' {of}it is written for version 0 of the plug-in interface; expected {API_VERSION}",
        f"The command 'greet' {of}the package more-plugins 1.2 registers a command of this name; "
        "uninstall one of the two",
        f"The command 'run' {of}compress has a command of this name; choose another one",
    ]


def test_commands_of_other_plugins_work_beside_unusable_ones(site: Path) -> None:
    help_page = call(site, "--help").stdout
    assert " greet " in help_page and " fail " in help_page and " run " in help_page
    done = call(site, "greet")
    assert (done.returncode, done.stdout) == (0, "hello\n")


def test_a_command_that_cannot_be_imported_names_its_module(site: Path) -> None:
    done = call(site, "fail")
    assert done.returncode == 2
    assert "The command 'fail' cannot be imported from nowhere_at_all:fail: ModuleNotFoundError" in done.stderr


def test_doctor_lists_plugins_and_those_that_cannot_be_used(site: Path) -> None:
    said = call(site, "doctor").stdout
    assert "plug-in good: Greets." in said
    assert "The plug-in 'broken' of the package more-plugins 1.2 is left out" in said
    assert "The stage 'missing_stage' of the package more-plugins 1.2 is left out: it cannot be imported" in said


@pytest.fixture(scope="module")
def without_diff(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of compress without the plug-in diff; its catalogue has a stage, a task and a format of diff."""
    folder = tmp_path_factory.mktemp("copy")
    skipped = shutil.ignore_patterns("__pycache__", "diff")
    shutil.copytree(ROOT / "compress", folder / "compress", ignore=skipped)
    file = folder / "compress" / "plugins" / plugins.CATALOGUE.name
    catalogue = json.loads(file.read_text())
    for point, name in MISSING.items():
        catalogue[point][name] = "diff"
    file.write_text(json.dumps(catalogue))
    return folder


MISSING = {"stages": "compare_tensors", "tasks": "tensor-comparison", "formats": "difference"}


@pytest.mark.parametrize("point", MISSING)
def test_a_recipe_that_needs_a_missing_plugin_names_it(point: str, without_diff: Path, tmp_path: Path) -> None:
    name = MISSING[point]
    changes: dict[str, dict[str, Any]] = {
        "stages": {"stages": [{name: {}}, "onnx"]},
        "tasks": {"task": name},
        "formats": {"targets": [{"cpu": {"format": name}}]},
    }
    recipe = tiny_run.write_all(tmp_path, **changes[point])
    done = call(tmp_path, "check", recipe, folder=without_diff)
    assert done.returncode == 2, done.stdout + done.stderr
    expected = f"the plug-in diff, which provides {name!r} and is not installed; reinstall compress"
    assert expected in " ".join(done.stderr.split())


def test_a_command_of_a_missing_plugin_names_it(without_diff: Path, tmp_path: Path) -> None:
    done = call(tmp_path, "diff", folder=without_diff)
    assert done.returncode == 2
    assert (
        "No such command 'diff'. It needs the plug-in diff, which provides 'diff' and is not installed" in done.stderr
    )
    help_page = call(tmp_path, "--help", folder=without_diff).stdout
    assert " run " in help_page and " diff " not in help_page


def test_the_catalogue_lists_everything_that_the_plugins_register() -> None:
    catalogue, specs = json.loads(plugins.CATALOGUE.read_text()), read_specs()
    for name, spec in specs.items():
        assert catalogue["plugins"][name] == {"summary": spec.summary, "install": spec.install}, "run `make docs`"
    for point in ("commands", *EXTENSION_POINTS):
        registered = {entry: name for name, spec in specs.items() for entry in getattr(spec, point)}
        # The catalogue also has the entries of plug-ins that are not installed.
        assert {entry: name for entry, name in catalogue[point].items() if name in specs} == registered, point
