"""Tests of the views of gates and comparisons: verdicts are shown, and text from reports is escaped."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from comparisons import accuracy, outcomes, report, row, time_row
from narrow import shown
from parsed_pages import parse_page

from compress.recipe.policy import Policy
from compress.report.compare.change import Comparison, Flip, MetricChange
from compress.report.compare.formatting import (
    effect_axis,
    interval_bar,
    ticks,
    value_text,
)
from compress.report.compare.gate import GateResult, judge_comparison
from compress.report.compare.pages import html_comparison, html_gate, markdown_comparison, markdown_gate
from compress.report.compare.reports import compare_reports
from compress.report.compare.views import (
    console_comparison,
    console_gate,
    escape_data,
    escape_property,
    github_gate,
    junit_gate,
)

EVIL = "<script>alert(1)</script>|`%0A\x1b[31m"
FLIP = Flip(row=7, now="wrong", label="a|b", baseline_answer="good", candidate_answer="bad", example=EVIL)


@pytest.fixture(scope="module")
def result() -> GateResult:
    """Return a gate result with a failure, an inconclusive metric, a pass, a flip and names that need escaping."""
    baseline = report(
        accuracy(outcomes(1740)), row("size_bytes", 91_300_000, "bytes"), time_row("latency_ms", 2.0, 0.2)
    )
    after = report(
        accuracy(outcomes(1740, lost=60, gained=30)), row("size_bytes", 91_300_000, "bytes"),
        time_row("latency_ms", 2.1, 0.2), recipe=EVIL,
    )  # fmt: skip
    policy = Policy()
    comparison = compare_reports(baseline, after, policy, names=("baseline.json", EVIL))
    return judge_comparison(comparison.model_copy(update={"flips": (FLIP,)}), policy)


def test_page_gives_a_repeated_reason_once() -> None:
    rows = [time_row(name, 2.0) for name in ("latency_ms", "latency_p90_ms", "startup_ms")]
    noise = {"noise": {"verdict": "unusable", "reasons": ["the rounds vary by 80%"]}}
    slower = [time_row(measurement.metric, 4.0) for measurement in rows]
    comparison = compare_reports(report(*rows), report(*slower, environment=noise), Policy())
    notes = [change.note for change in comparison.changes]
    assert len(notes) == 3 and len({*notes}) == 1
    cells = re.findall(r'<td class="plot">.*?</td>', html_comparison(comparison), re.DOTALL)
    reasons = [re.sub(r"<svg.*?</svg>|<[^>]+>", "", cell, flags=re.DOTALL).strip() for cell in cells]
    assert reasons == [notes[0], "for the same reason", "for the same reason"]


def change(**fields: object) -> MetricChange:
    values: dict[str, object] = {
        "metric": "latency_ms", "target": "cpu", "unit": "ms", "baseline": 2.0, "candidate": 2.1, "scale": "relative",
        "effect": 0.05, "low": 0.01, "high": 0.09, "confidence": 0.99, "margin": 0.02, "verdict": "worse", "n": 10,
        "method": "made up",
    }  # fmt: skip
    return MetricChange.model_validate({**values, **fields})


def test_byte_counts_that_differ_by_one_are_shown_in_full() -> None:
    bytes_ = change(metric="size_bytes", unit="bytes", baseline=4_801_058, candidate=4_801_059, effect=2e-7)
    assert value_text(bytes_, bytes_.candidate) == "4,801,059 bytes"
    assert value_text(change(metric="size_bytes", unit="bytes", baseline=9e6, candidate=4.8e6), 4.8e6) == "4.80 MB"


def test_console_shows_the_verdict(result: GateResult) -> None:
    text = shown(console_gate(result), 200)
    assert "Failed: accuracy (1 of 3, 1 inconclusive)." in text
    assert "allowed 0.5 points worse; worse" in text
    assert "\x1b" not in text
    assert "Worse: accuracy; 1 same; 1 inconclusive." in shown(console_comparison(result.comparison), 200)


def test_markdown_puts_the_verdict_first_and_escapes(result: GateResult) -> None:
    text = markdown_gate(result)
    assert text.splitlines()[0] == "**\u274c Failed: accuracy (1 of 3, 1 inconclusive).**"
    assert "<script>" not in text
    assert text.count("<details>") == text.count("</details>") == 3
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {10, 7}
    assert markdown_comparison(result.comparison).startswith("**Worse: accuracy; 1 same; 1 inconclusive.**")


def test_junit_has_a_case_for_each_judgement(result: GateResult) -> None:
    root = ElementTree.fromstring(junit_gate(result))
    assert (root.get("tests"), root.get("failures"), root.get("skipped")) == ("3", "1", "1")
    cases = {case.get("name"): [child.tag for child in case] for case in root.iter("testcase")}
    assert cases == {
        "accuracy no more than 0.5 points worse": ["failure"],
        "latency_ms no more than 5% worse": ["skipped"],
        "size_bytes no more than 0% worse": ["system-out"],
    }
    failure = root.find(".//failure")
    assert failure is not None
    assert "-1.50 points" in (failure.text or "")


def test_github_lines_are_one_command_each(result: GateResult) -> None:
    lines = github_gate(result).splitlines()
    assert [line.split(" ")[0] for line in lines] == ["::error", "::warning", "::notice"]
    assert lines[0].startswith("::error title=compress gate%3A accuracy::accuracy on cpu: 87.00%25 ")
    assert all(line.count("::") == 2 for line in lines)


def test_github_escapes_as_its_toolkit() -> None:
    # actions/toolkit, packages/core/src/command.ts
    assert escape_data("50%\r\nof: a,b") == "50%25%0D%0Aof: a,b"
    assert escape_property("50%\r\nof: a,b") == "50%25%0D%0Aof%3A a%2Cb"


@pytest.mark.parametrize("kind", ["gate", "comparison"])
def test_page_is_complete_and_escaped(result: GateResult, kind: str) -> None:
    page = html_gate(result) if kind == "gate" else html_comparison(result.comparison)
    parsed = parse_page(page)
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("script") == 2  # the data and the page's own
    assert tags.count("circle") == 3
    assert not {name for _, attributes in parsed.tags for name in attributes} & {"style", "onclick", "onload"}
    assert "default-src 'none'" in page
    assert EVIL[:25] in "".join(parsed.texts)


def test_worse_is_right_of_the_middle_for_every_metric() -> None:
    drop = change(metric="accuracy", unit="ratio", scale="absolute", effect=-0.02, low=-0.03, high=-0.01, margin=0.005)
    rise = drop.model_copy(update={"effect": 0.02, "low": 0.01, "high": 0.03, "verdict": "better"})
    axis = effect_axis([drop, rise])

    def middle(change: MetricChange) -> float:
        return interval_bar(change, axis).value

    assert middle(rise) == pytest.approx(100 - middle(drop), abs=0.02)
    assert middle(drop) > 60
    slow = change()
    assert effect_axis([slow])(0.0) < 50
    labels = dict(ticks(effect_axis([slow.model_copy(update={"effect": 9.0, "high": 12.0})]), relative=True))
    assert "10x" in labels.values()


def test_single_change_of_zero_has_an_axis() -> None:
    still = change(effect=0.0, low=0.0, high=0.0, margin=0.0, confidence=None, verdict="same")
    assert effect_axis([still])(0.0) == pytest.approx(50)
    assert interval_bar(still, effect_axis([still])).value == pytest.approx(50)


def test_an_empty_gate_says_so(result: GateResult) -> None:
    comparison: Comparison = result.comparison
    empty = GateResult(comparison=comparison, judgements=())
    assert not empty.failed
    assert markdown_gate(empty).startswith("**\u2705 Nothing was judged.**")
    assert html_gate(empty)
