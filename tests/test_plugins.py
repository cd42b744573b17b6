"""Tests of the discovery of plug-ins and of what is recorded about those that cannot be used.

`tests/third_party` holds a whole package that extends compress.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from compress import plugins
from compress.plugins import UnusablePluginError, find_extensions, load_extension, load_extensions, plugin_problems

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
    """Pairs of an entry point's name and its object in the group of stages, which the test fills in."""
    (tmp_path / "plugged.py").write_text(MODULE)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no such luck')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pairs: list[tuple[str, str]] = []

    def entry_points(group: str) -> EntryPoints:
        return EntryPoints(EntryPoint(name, value, group) for name, value in pairs if group == "compress.stages")

    monkeypatch.setattr(plugins, "entry_points", entry_points)
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
