"""Tests of the trend page in Chromium: lines, filters, injections, and layout at phone width."""

from __future__ import annotations

from typing import Any

import nights
import pytest
from browser import Browser, covered

from compress.plugins.nightly.views import night_page

pytestmark = pytest.mark.browser

DRAWN = """
const panels = [...document.querySelectorAll(".trends > figure")];
const shown = () => panels.filter((panel) => panel.getBoundingClientRect().height > 0)
  .map((panel) => [panel.dataset.entry, panel.dataset.metric, panel.dataset.model].join(" "));
const form = document.querySelector(".filters");
const choose = (changes) => {
  for (const [name, value] of Object.entries(changes)) {
    const field = form.elements[name];
    if (field.type === "checkbox") field.checked = value; else field.value = value;
  }
  form.dispatchEvent(new Event("change"));
  return shown();
};
const labels = panels.filter((panel) => !panel.hidden).map((panel) =>
  [...panel.querySelectorAll("text.size, text.tick")].map((t) => [t.textContent, ...box(t)]));
return {
  first: shown(), labels, filters: form.getBoundingClientRect().height,
  lines: [...document.querySelectorAll(".trends figure:not([hidden]) .curve")].map((line) => line.getBBox().width),
  marks: document.querySelectorAll(".trends figure:not([hidden]) g.change").length,
  everything: choose({metric: "", model: "", entry: ""}),
  one: choose({metric: "latency_ms", model: "final", entry: "tiny"}),
  changed: choose({metric: "*main", model: "final", entry: "", changed: true}),
  overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth };
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    history = nights.story(tmp_path_factory.mktemp("story") / "history.sqlite")
    read = history.read(nights.SUITE)
    return night_page(read[-1], read, history.series(nights.SUITE), "Invented nights.")


def drawn(browser: Browser, page: str, width: int = 1280) -> Any:
    seen = browser.look(page, DRAWN, width)
    assert (seen.said, seen.asked) == ([], [])
    return seen.found


def test_injected_script_is_blocked(browser: Browser, page: str) -> None:
    injected = page.replace("</body>", "<script>document.title='owned'</script></body>")
    seen = browser.look(injected, "document.title")
    assert seen.found.startswith("made-up")
    assert len([line for line in seen.said if "Content Security Policy" in line]) == 1


def test_lines_are_drawn_and_filtered(browser: Browser, page: str) -> None:
    drawing = drawn(browser, page)
    names = ("accuracy", "latency_ms", "size_bytes", "throughput")
    assert sorted(drawing["first"]) == sorted(f"{entry} {name} final" for entry in ("tiny", "narrow") for name in names)
    assert len(drawing["everything"]) == 12
    assert drawing["one"] == ["tiny latency_ms final"]
    # In the story all metrics changed except the accuracy of `narrow`.
    assert sorted(drawing["changed"]) == sorted(set(drawing["first"]) - {"narrow accuracy final"})
    assert drawing["filters"] > 30
    assert all(width > 300 for width in drawing["lines"])
    assert drawing["marks"] >= 9


@pytest.mark.parametrize("width", [1280, 500, 390])
def test_page_does_not_overflow_and_labels_do_not_overlap(browser: Browser, page: str, width: int) -> None:
    drawing = drawn(browser, page, width)
    assert (drawing["width"], drawing["overflow"]) == (width, 0)
    for chart in drawing["labels"]:
        assert all(left >= 0 and right <= width for _, left, _, right, _ in chart)
        assert covered(chart) == []


def test_dark_mode_has_a_dark_background(browser: Browser, page: str) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    colours = [browser.look(page, colour, dark=dark).found for dark in (False, True)]
    assert colours == ["rgb(245, 246, 248)", "rgb(15, 18, 23)"]
