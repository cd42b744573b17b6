"""Tests of the sample catalog: samples registered by packages, and errors of packages that cannot be used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from compress import plugins
from compress.data.samples.sample import find_sample, known_samples
from compress.plugins import plugin_problems
from compress.utils.errors import SampleError

MODULE = """
from compress.data.samples.sample import Package, Sample

def sample(name):
    package = Package("pip", "a", "1", "a-1.whl", "0" * 64, 1, "LICENSE", "a", ("b",))
    return Sample(name, "data", "words", "MIT", (package,))

OWN = (sample("words"), sample("more-words"))
TWICE = (sample("others"), sample("words"))
NOTHING = {"words": sample("words")}
"""


@pytest.fixture
def registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Return a mutable list of entry points (name, object reference), which replaces those really installed."""
    (tmp_path / "own_samples.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_problems", {})
    pairs: list[tuple[str, str]] = []
    monkeypatch.setattr(
        plugins,
        "entry_points",
        lambda group: EntryPoints(
            EntryPoint(name, value, group) for name, value in pairs if group == "compress.samples"
        ),
    )
    known_samples.cache_clear()
    yield pairs
    known_samples.cache_clear()


def test_samples_of_installed_packages_are_found(registered: list[tuple[str, str]]) -> None:
    registered.append(("own", "own_samples:OWN"))
    assert list(known_samples()) == ["words", "more-words"]
    assert find_sample("sample:words").requirements == "a==1"
    assert plugin_problems() == ()


def test_unknown_sample_gives_installation_command(registered: list[tuple[str, str]]) -> None:
    with pytest.raises(SampleError) as caught:
        find_sample("minilm")
    assert "no sample 'minilm'" in str(caught.value)
    assert "pip install --force-reinstall compress-models" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("own_samples:TWICE", "another package has samples named words"),
        ("own_samples:NOTHING", "it is no tuple of"),
        ("own_samples:MISSING", "AttributeError"),
        ("not_there:OWN", "ModuleNotFoundError"),
    ],
)
def test_invalid_package_is_reported_and_others_work(
    value: str, reason: str, registered: list[tuple[str, str]]
) -> None:
    registered += [("bad", value), ("a", "own_samples:OWN")]
    if "TWICE" in value:
        registered.sort()  # entry points of one package are ordered by name
    assert {"words", "more-words"} <= set(known_samples())
    assert "others" not in known_samples()
    with pytest.raises(SampleError, match=re.escape(reason)) as caught:
        find_sample("others")
    assert value.partition(":")[0] in str(caught.value)
