"""Tests of the report page in Chromium: layout, and no console messages or requests."""

from __future__ import annotations

import pytest
from browser import Browser, covered
from generation_reports import generation_report

from compress.report.pages import html_page
from compress.results.report import Report

pytestmark = pytest.mark.browser

DOCUMENT = "document.documentElement.outerHTML"
DRAWN = """
const size = (node) => { const b = node.getBoundingClientRect(); return [b.width, b.height]; };
const buttons = [...document.querySelectorAll("table.sortable th button")];
const sorter = buttons.find((button) => button.textContent === "Accuracy");
const order = () => [...sorter.closest("table").tBodies[0].rows].map((row) => row.cells[0].textContent);
sorter.click();
const rising = order();
sorter.click();
return {
  svgs: [...document.querySelectorAll("svg")].filter((s) => !s.closest("details")).map(size), rising, falling: order(),
  labels: [...document.querySelectorAll("svg.chart")].map((svg) =>
    [...svg.querySelectorAll("text")].map((t) => [t.textContent, ...box(t)])),
  letters: [...document.querySelectorAll("svg.chart text")].map((t) =>
    parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a),
  overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
  resources: performance.getEntriesByType("resource").map((entry) => entry.name) };
"""


def test_page_runs_without_errors_or_requests(browser: Browser, report: Report) -> None:
    seen = browser.look(html_page(report), DOCUMENT)
    assert (seen.said, seen.asked) == ([], [])
    assert 'id="tip"' in seen.found  # the script ran under the page's own policy
    assert seen.found.count("<button") > 10
    assert "1 of 4 limits missed" in seen.found


def test_content_security_policy_blocks_injected_code(browser: Browser, report: Report) -> None:
    injected = "<script>document.title='owned'</script><img src='http://leak.invalid/report'>"
    seen = browser.look(html_page(report).replace("</body>", injected + "</body>"), "document.title")
    assert seen.found == "quickstart \u00b7 compress report"
    assert len([line for line in seen.said if "Content Security Policy" in line]) == 2
    assert seen.asked == []


def test_request_without_policy_is_recorded(browser: Browser) -> None:
    assert browser.look("<!doctype html><img src='http://seen.invalid/x'>").asked == ["seen.invalid"]


def test_charts_are_drawn_and_tables_sort(browser: Browser, report: Report) -> None:
    seen = browser.look(html_page(report), DRAWN)
    assert seen.said == []
    sizes = seen.found["svgs"]
    assert len(sizes) > 20
    assert all(width > 20 and height > 5 for width, height in sizes)
    assert seen.found["resources"] == []
    right = {"distill": 1752, "baseline": 1746, "prune": 1741, "final (quantize)": 1737}  # as the fixture invents them
    rising = [name for name in seen.found["rising"] if name in right]
    assert rising == sorted(right, key=lambda name: right[name])
    assert [name for name in seen.found["falling"] if name in right] == rising[::-1]


@pytest.mark.parametrize("width", [1280, 500, 390])
def test_labels_do_not_overlap(browser: Browser, report: Report, width: int) -> None:
    boxes = browser.look(html_page(report), DRAWN, width).found
    assert (boxes["width"], boxes["overflow"]) == (width, 0)
    assert min(boxes["letters"]) > 8.5, "letters in pixels of the screen"
    assert [words for chart in boxes["labels"] for words in covered(chart)] == []


def test_chart_tooltip_is_accessible_by_keyboard(browser: Browser, report: Report) -> None:
    tooltips = browser.look(
        html_page(report),
        """const mark = document.querySelector(".chart g.point.final"), tip = document.getElementById("tip");
        const before = tip.hidden; mark.focus(); const focused = [tip.hidden, tip.textContent]; mark.blur();
        return {before, focused, after: tip.hidden, spoken: mark.getAttribute("aria-label")};""",
    ).found
    assert (tooltips["before"], tooltips["after"], tooltips["focused"][0]) == (True, True, False)
    assert tooltips["spoken"] == tooltips["focused"][1]
    assert "86.85%" in tooltips["spoken"]
    assert "5.12 MB" in tooltips["spoken"]


def test_dark_mode_has_a_dark_background(browser: Browser, report: Report) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    colours = [browser.look(html_page(report), colour, dark=dark).found for dark in (False, True)]
    assert colours == ["rgb(245, 246, 248)", "rgb(15, 18, 23)"]


SIDES = """return [...document.querySelectorAll("article.written")].map((card) => ({
    box: box(card), sides: [...card.querySelectorAll(".side")].map(box),
    colours: [...card.querySelectorAll(".text, .apart")].map((node) => getComputedStyle(node).color) }));"""


@pytest.mark.parametrize("width", [1280, 420])
def test_continuations_are_side_by_side_or_stacked(browser: Browser, width: int) -> None:
    seen = browser.look(html_page(generation_report()), SIDES, width)
    assert (seen.said, seen.asked, len(seen.found)) == ([], [], 3)
    for card in seen.found:
        left, top, right, bottom = card["box"]
        first, other = card["sides"]
        for x1, y1, x2, y2 in (first, other):
            assert left <= x1 < x2 <= right <= width and top <= y1 < y2 <= bottom
        side, edge = (2, 0) if width == 1280 else (3, 1)
        assert first[side] <= other[edge] and first[1 - edge] == other[1 - edge]
    # After the first difference, each model's text has its own colour.
    plain, baseline, same, final = seen.found[0]["colours"]
    assert plain == same and len({plain, baseline, final}) == 3
