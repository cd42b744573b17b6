"""Tests of a night's views: exit code, JUnit file and page, with escaped text."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import nights
import pytest
from nights import SUITE, ignore, night, outcome, row

from compress.plugins.nightly.history import NightHistory
from compress.plugins.nightly.record import Night, NightFinding
from compress.plugins.nightly.views import night_junit, night_markdown, night_page

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> NightHistory:
    return nights.story(tmp_path_factory.mktemp("story") / "history.sqlite")


def bad_night() -> Night:
    findings = (
        NightFinding(entry="a", kind="gate", metric="latency_ms", target="cpu", what="6.1% higher", since="night 3"),
        NightFinding(entry="b", kind="stage", what="failed: the disk is full"),
        NightFinding(entry="c", kind="budget", what="not run: no time"),
    )  # fmt: skip
    outcomes = (
        outcome("a", "missed", reason="6.1% higher", notes=("shared",)),
        outcome("b", "failed", reason="the disk is full\nsecond line", exit_code=3, notes=("shared",)),
        outcome("c", "not run", reason="no time"),
        outcome("d"),
    )
    return night(4, outcomes, findings).model_copy(update={"number": 5})


def test_exit_code_is_that_of_the_worst_outcome() -> None:
    gate, stage, budget = bad_night().findings
    assert [night(0, [], findings).exit_code for findings in ([], [gate], [budget], [gate, stage])] == [0, 1, 1, 3]


def test_junit_has_errors_failures_and_skips() -> None:
    root = ElementTree.fromstring(night_junit(bad_night()))
    counts = {
        suite.get("name"): tuple(suite.get(key) for key in ("tests", "failures", "errors", "skipped"))
        for suite in root.iter("testsuite")
    }
    assert counts == {
        "a": ("2", "1", "0", "0"),
        "b": ("1", "0", "1", "0"),
        "c": ("1", "0", "0", "1"),
        "d": ("1", "0", "0", "0"),
    }
    (failure,) = root.iter("failure")
    assert failure.get("message") == "a: latency_ms on cpu: 6.1% higher, since night 3"


def test_page_marks_changes_with_night_size_and_commit(story: NightHistory) -> None:
    read = story.read(SUITE)
    page = night_page(read[-1], read, story.series(SUITE))
    marks = re.findall(r'<g class="change (\w+)" tabindex="0">.*?<title>(.*?)</title>', page, re.S)
    step = [words for state, words in marks if state == "worse" and "onnxruntime 1.31.2 \u2192 1.32.0" in words]
    # In the story the final model's latency rose by 6.5% at night 53.
    assert any(re.match(r"\+[67]\.\d% since night 53 \(2026-09-22, commit 0019223\)", words) for words in step)
    assert page.count('class="point failed"') == 18
    assert "1 missed of 2 entries" in page


def test_page_of_a_single_night_has_no_plural(tmp_path: Path) -> None:
    history = NightHistory(tmp_path / "history.sqlite", ignore)
    first = history.append(night(0, [outcome()]), {"tiny": (row("latency_ms", 1.0, "ms"),)})
    page = night_page(first, [first], history.series(SUITE))
    assert ">This night</th>" in page
    assert not re.search(r"\b1 nights", page)
    second = history.append(night(1, [outcome()]), {"tiny": (row("latency_ms", 1.0, "ms"),)})
    assert ">Last 2 nights</th>" in night_page(second, history.read(SUITE), history.series(SUITE))


def test_external_text_is_escaped_in_all_views(tmp_path: Path) -> None:
    history = NightHistory(tmp_path / "history.sqlite", ignore)
    finding = NightFinding(entry=EVIL, kind="gate", metric=EVIL, target=EVIL, what=EVIL, since=EVIL)
    appended = history.append(
        night(0, [outcome(EVIL, "missed", reason=EVIL, notes=(EVIL,))], [finding], software={EVIL: EVIL}, commit=EVIL),
        {EVIL: (row(EVIL, 1.0, EVIL, EVIL), row("latency_ms", 1.0, "ms"))},
    )
    page = night_page(appended, [appended], history.series(SUITE), EVIL)
    assert EVIL not in page
    assert "<script>alert" not in night_markdown(appended)
    ElementTree.fromstring(night_junit(appended))


def test_other_hosts_have_separate_charts(tmp_path: Path) -> None:
    history = NightHistory(tmp_path / "history.sqlite", ignore)
    other = nights.HOST.model_copy(update={"digest": "bb", "words": "Another processor"})
    for number in range(6):
        history.append(night(number, [outcome()], host=other if number % 2 else nights.HOST),
                       {"tiny": (row("latency_ms", 1.0, "ms"),)})  # fmt: skip
    read = history.read(SUITE)
    page = night_page(read[-1], read, history.series(SUITE))
    assert len(re.findall(r"<figure ", page)) == 2
    assert 'name="host"' in page
