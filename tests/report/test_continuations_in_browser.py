"""What two models write, side by side in a real Chromium, wide and narrow."""

from __future__ import annotations

from typing import Any

import pytest
from browser import Browser
from generation_reports import PROMPTS, TEXTS, generation_report

from compress.report.pages import html_page

pytestmark = pytest.mark.browser

CARDS = """
return {
  cards: [...document.querySelectorAll("article.written")].map((card) => ({
    box: box(card), sides: [...card.querySelectorAll(".side")].map(box),
    prompt: card.querySelector(".prompt").textContent,
    texts: [...card.querySelectorAll(".text")].map((text) => text.textContent),
    colours: [...card.querySelectorAll(".text, .apart")].map((node) => getComputedStyle(node).color),
    chips: [...card.querySelectorAll(".chip")].map((chip) => chip.textContent) })),
  wide: document.documentElement.scrollWidth };
"""


def visited(browser: Browser, page: str, width: int) -> Any:
    """What a browser makes of a page that is ``width`` pixels wide; it has said nothing on its console."""
    seen = browser.look(page, CARDS, width)
    assert (seen.said, seen.asked) == ([], [])
    return seen.found


@pytest.mark.parametrize("width", [1280, 420])
def test_each_prompt_has_both_texts_beside_or_below_each_other(browser: Browser, width: int) -> None:
    layout = visited(browser, html_page(generation_report()), width)
    assert layout["wide"] <= width
    assert [card["prompt"] for card in layout["cards"]] == list(PROMPTS)
    for index, card in enumerate(layout["cards"]):
        assert card["texts"] == [TEXTS["baseline"][index], TEXTS["final"][index]]
        left, top, right, bottom = card["box"]
        first, other = card["sides"]
        for x1, y1, x2, y2 in (first, other):
            assert left <= x1 < x2 <= right and top <= y1 < y2 <= bottom
        is_beside = first[2] <= other[0] and first[1] == other[1]
        below = first[3] <= other[1] and first[0] == other[0]
        assert (is_beside, below) == ((True, False) if width == 1280 else (False, True))
    above = [card["box"][3] for card in layout["cards"][:-1]]
    assert all(end <= card["box"][1] for end, card in zip(above, layout["cards"][1:], strict=True))
    # Where the two part, the rest has another colour than the text, and each model its own.
    plain, baseline, same, final = layout["cards"][0]["colours"]
    assert plain == same and len({plain, baseline, final}) == 3
    assert layout["cards"][1]["colours"] == [plain, plain]
    assert [card["chips"] for card in layout["cards"]] == [[], [], ["repeats itself: 71%"]]
