"""Tests of a profile's page in Chromium: layout at both widths, and no console messages or requests."""

from __future__ import annotations

from typing import Any

import profiles
import pytest
from browser import Browser, covered

from compress.report.profile_views import profile_page

pytestmark = pytest.mark.browser

DRAWN = """
const first = document.querySelector("table.sortable");
[...first.querySelectorAll("th button")].find((button) => button.textContent === "Time").click();
const chart = document.querySelector("svg.chart");
return {
  rising: [...first.tBodies[0].rows].map((row) => row.cells[0].textContent),
  chart: box(chart), dots: [...chart.querySelectorAll("circle")].map(box),
  fills: [...chart.querySelectorAll("circle")].map((dot) => getComputedStyle(dot).fill),
  roofs: [...chart.querySelectorAll("line.roof")].map((line) => getComputedStyle(line).stroke),
  labels: [...chart.querySelectorAll("text.label")].map((label) => [label.textContent, ...box(label)]),
  overflow: document.documentElement.scrollWidth - innerWidth,
  page: getComputedStyle(document.body).backgroundColor };
"""


def outcome(browser: Browser, width: int = 1200, dark: bool = False) -> Any:
    seen = browser.look(profile_page(profiles.profile()), DRAWN, width, 1400, dark)
    assert (seen.said, seen.asked) == ([], [])
    return seen.found


@pytest.mark.parametrize("width", [1200, 400])
def test_chart_and_labels_are_within_the_page(browser: Browser, width: int) -> None:
    layout = outcome(browser, width)
    assert layout["overflow"] <= 0
    left, top, right, bottom = layout["chart"]
    assert right - left > 300 and bottom - top > 200
    assert len(layout["dots"]) == 2
    for x1, y1, x2, y2 in layout["dots"]:
        assert left <= x1 < x2 <= right and top <= y1 < y2 <= bottom
    assert {label[0] for label in layout["labels"]} == {"whole model", "MatMul", "DynamicQuantizeMatMul"}
    assert covered(layout["labels"], 0.0) == []
    assert len(set(layout["fills"])) == 2, "8-bit and float products have colours of their own"
    assert len(layout["roofs"]) == 4 and len(set(layout["roofs"])) >= 3
