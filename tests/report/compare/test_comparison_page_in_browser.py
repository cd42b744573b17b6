"""Tests of a gate's page in Chromium: layout at both widths, and no console messages or requests."""

from __future__ import annotations

from typing import Any

import pytest
from browser import Browser, covered
from comparisons import accuracy, outcomes, report, row, time_row

from compress.recipe.policy import Policy
from compress.report.compare.gate import judge_comparison
from compress.report.compare.pages import html_gate
from compress.report.compare.reports import compare_reports
from compress.results.report import SliceRecord

pytestmark = pytest.mark.browser

DRAWN = """
return {
  rows: [...document.querySelectorAll("table.changes tbody tr")].map((tr) => ({
    name: tr.cells[0].textContent, dot: box(tr.querySelector(".dot")), plot: box(tr.querySelector("svg.forest")),
    chip: box(tr.querySelector(".chip")), card: box(tr.closest(".card")),
    band: box(tr.querySelector(".band")), fill: getComputedStyle(tr.querySelector(".dot")).fill })),
  labels: [...document.querySelectorAll("svg.head")].map((svg) =>
    [...svg.querySelectorAll("text")].map((t) => [t.textContent, ...box(t)])),
  overflow: document.documentElement.scrollWidth - innerWidth,
  page: getComputedStyle(document.body).backgroundColor };
"""


@pytest.fixture(scope="module")
def page() -> str:
    """Return the page of a gate with failures, an inconclusive metric, passes and slices."""
    members = [i < 1000 for i in range(2000)]
    slices = {"first half": SliceRecord.of(members), "second half": SliceRecord.of([not m for m in members])}
    memory = row("peak_memory_bytes", 9e7, "bytes")
    baseline = report(
        accuracy(outcomes(1740)), row("size_bytes", 5_000_000, "bytes"), time_row("latency_ms", 2.0),
        time_row("startup_ms", 150.0, 0.3), memory, slices=slices,
    )  # fmt: skip
    after = report(
        accuracy(outcomes(1740, lost=60, gained=10)), row("size_bytes", 5_000_001, "bytes"),
        time_row("latency_ms", 2.6), time_row("startup_ms", 160.0, 0.3), memory, slices=slices,
    )  # fmt: skip
    policy = Policy()
    return html_gate(
        judge_comparison(compare_reports(baseline, after, policy, names=("baseline.json", "tonight")), policy)
    )


def drawn(browser: Browser, page: str, width: int = 1280, dark: bool = False) -> Any:
    seen = browser.look(page, DRAWN, width, dark=dark)
    assert (seen.said, seen.asked) == ([], [])
    return seen.found


@pytest.mark.parametrize("width", [1280, 500, 390])
def test_every_row_is_inside_its_card(browser: Browser, page: str, width: int) -> None:
    layout = drawn(browser, page, width)
    assert layout["overflow"] == 0
    assert len(layout["rows"]) == 7
    for drawn_row in layout["rows"]:
        left, _, right, _ = drawn_row["plot"]
        assert right - left > 150
        assert left - 6 <= drawn_row["dot"][0] <= drawn_row["dot"][2] <= right + 6
        assert drawn_row["card"][0] < drawn_row["chip"][0] < drawn_row["chip"][2] <= drawn_row["card"][2]
    accuracy_row = layout["rows"][0]
    assert accuracy_row["name"].startswith("accuracy")
    assert accuracy_row["dot"][0] > accuracy_row["band"][2]  # worse than the margin: right of the band


def test_tick_labels_do_not_overlap(browser: Browser, page: str) -> None:
    layout = drawn(browser, page)
    assert sum(map(len, layout["labels"])) >= 12
    assert [words for head in layout["labels"] for words in covered(head)] == []
