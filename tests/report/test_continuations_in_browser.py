"""What two models write, side by side in a real Chromium, wide and narrow, hostile text among it."""

from __future__ import annotations

import html
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from generation_reports import PROMPTS, TEXTS, generation_report

from compress.report.html import html_page
from compress.report.schema import ContinuationRecord

pytestmark = pytest.mark.browser

HOSTILE = (
    "</p></article><script>parent.document.title = 'owned'</script>",
    "<img src='x' onerror=\"parent.document.title = 'owned'\"> &lt;b&gt; &amp; \"'></span>",
    "one\n\n  two\ttabs\u202e reversed " + "unbroken" * 60,
)
# The page lies in a frame, whose width may be less than Chromium allows a window, and runs under its own policy.
WRAPPER = """<!doctype html><title>wrapper</title><body style="margin:0">
<iframe id="frame" width="{width}" height="4000" style="border:0" srcdoc="{page}"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.getElementById("frame").contentDocument;
  const box = (node) => {{ const b = node.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }};
  const cards = [...page.querySelectorAll("article.written")].map((card) => ({{
    box: box(card), sides: [...card.querySelectorAll(".side")].map(box),
    prompt: card.querySelector(".prompt").textContent,
    texts: [...card.querySelectorAll(".text")].map((text) => text.textContent),
    colours: [...card.querySelectorAll(".text, .apart")].map((node) => page.defaultView.getComputedStyle(node).color),
    chips: [...card.querySelectorAll(".chip")].map((chip) => chip.textContent),
    strangers: card.querySelectorAll("img, script, b").length }}));
  const out = document.createElement("pre");
  out.id = "outcome";
  out.textContent = JSON.stringify({{
    cards, wide: page.documentElement.scrollWidth, title: document.title, inner: page.defaultView.innerWidth }});
  document.body.append(out);
}});
</script></body>"""


def visited(chromium: str, folder: Path, page: str, width: int) -> dict[str, Any]:
    """What a browser makes of a page that is ``width`` pixels wide; it has said nothing on its console."""
    wrapper = folder / "wrapper.html"
    wrapper.write_text(WRAPPER.format(width=width, page=html.escape(page)), encoding="utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", "--hide-scrollbars",
        f"--window-size={max(width, 500)},4000", "--dump-dom", wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<pre id="outcome">(.*?)</pre>', done.stdout, re.S)
    assert found is not None
    content = json.loads(html.unescape(found[1]))
    assert isinstance(content, dict) and content["inner"] == width
    return content


@pytest.mark.parametrize("width", [1280, 420])
def test_each_prompt_has_both_texts_beside_or_below_each_other(chromium: str, tmp_path: Path, width: int) -> None:
    found = visited(chromium, tmp_path, html_page(generation_report()), width)
    assert found["wide"] <= width
    assert [card["prompt"] for card in found["cards"]] == list(PROMPTS)
    for place, card in enumerate(found["cards"]):
        assert card["texts"] == [TEXTS["baseline"][place], TEXTS["final"][place]]
        left, top, right, bottom = card["box"]
        one, other = card["sides"]
        for x1, y1, x2, y2 in (one, other):
            assert left <= x1 < x2 <= right and top <= y1 < y2 <= bottom
        beside = one[2] <= other[0] and one[1] == other[1]
        below = one[3] <= other[1] and one[0] == other[0]
        assert (beside, below) == ((True, False) if width == 1280 else (False, True))
    above = [card["box"][3] for card in found["cards"][:-1]]
    assert all(end <= card["box"][1] for end, card in zip(above, found["cards"][1:], strict=True))
    # Where the two part, the rest has another colour than the text, and each model its own.
    plain, baseline, same, final = found["cards"][0]["colours"]
    assert plain == same and len({plain, baseline, final}) == 3
    assert found["cards"][1]["colours"] == [plain, plain]
    assert [card["chips"] for card in found["cards"]] == [[], [], ["repeats itself: 71%"]]


@pytest.mark.parametrize("width", [1280, 420])
def test_hostile_text_is_shown_and_does_nothing(chromium: str, tmp_path: Path, width: int) -> None:
    written = [
        ContinuationRecord(model=model, target="cpu", prompt=prompt, text=text, repeated=0.0)
        for model in ("baseline", "final")
        for prompt, text in zip(HOSTILE, HOSTILE[::-1] if model == "final" else HOSTILE, strict=True)
    ]
    found = visited(chromium, tmp_path, html_page(generation_report(continuations=tuple(written))), width)
    assert found["title"] == "wrapper"
    assert found["wide"] <= width
    assert [card["prompt"] for card in found["cards"]] == list(HOSTILE)
    assert [card["texts"] for card in found["cards"]] == [
        [text, HOSTILE[-1 - place]] for place, text in enumerate(HOSTILE)
    ]
    assert [card["strangers"] for card in found["cards"]] == [0, 0, 0]
