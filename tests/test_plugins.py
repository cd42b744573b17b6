"""What is said of a plugin that cannot be used; `tests/third_party/` has one that can."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from compress import plugins
from compress.plugins import STAGES, UnusablePluginError, load_plugin, load_plugins, plugin_errors

MODULE = """
GOOD = "good"
TWIN = "good"
TAKEN = "cast"
LACKING = ""
"""


@pytest.fixture(autouse=True)
def no_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_errors", {})


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Pairs of an entry point's name and its object, which the test fills in."""
    (tmp_path / "plugged.py").write_text(MODULE)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no such luck')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    pairs: list[tuple[str, str]] = []
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: EntryPoints(EntryPoint(name, value, group) for name, value in pairs)
    )
    yield pairs


def accept(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise UnusablePluginError("it has no letters; expected a word")
    return value


def load() -> dict[str, str]:
    return load_plugins(STAGES, ["cast"], accept, lambda value: value)


def test_a_good_one_is_known_by_its_own_name(registered: list[tuple[str, str]]) -> None:
    registered.append(("whatever", "plugged:GOOD"))
    assert load() == {"good": "good"}
    assert plugin_errors() == ()


@pytest.mark.parametrize(
    ("value", "package", "reason"),
    [
        ("broken_plugin:X", "broken_plugin", "RuntimeError: no such luck"),
        ("not_there:X", "not_there", "ModuleNotFoundError"),
        ("plugged:NOT_THERE", "plugged", "AttributeError"),
        ("plugged:LACKING", "plugged", "it has no letters; expected a word"),
        ("plugged:TAKEN", "plugged", "built in"),
    ],
)
def test_a_bad_one_is_named_with_its_package_and_the_others_work(
    value: str, package: str, reason: str, registered: list[tuple[str, str]]
) -> None:
    registered += [("bad", value), ("fine", "plugged:GOOD")]
    assert load() == {"good": "good"}
    (error,) = plugin_errors()
    assert (error.group, error.package) == (STAGES, package)
    assert reason in str(error) and package in str(error)


def test_of_two_with_one_name_the_second_is_left_out(registered: list[tuple[str, str]]) -> None:
    registered += [("first", "plugged:GOOD"), ("second", "plugged:TWIN")]
    assert load() == {"good": "good"}
    (error,) = plugin_errors()
    assert "the package plugged has one of that name" in error.reason


def test_names_are_known_before_anything_is_imported(registered: list[tuple[str, str]]) -> None:
    registered += [("bad", "broken_plugin:X"), ("cast", "plugged:GOOD")]
    found = plugins.plugins(STAGES, ["cast"])
    assert list(found) == ["bad"]
    assert [error.name for error in plugin_errors()] == ["cast"]
    assert load_plugin(found["bad"], accept) is None
    assert [error.name for error in plugin_errors()] == ["bad", "cast"]
