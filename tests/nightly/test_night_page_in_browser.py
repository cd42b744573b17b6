"""The trend page in a real Chromium: drawn, filtered, quiet, and within the width of a phone."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import nights
import pytest

from compress.nightly.page import night_page

pytestmark = pytest.mark.browser

PROBE = """
<script>
addEventListener("load", () => {
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
    [...panel.querySelectorAll("text.size, text.tick")].map((t) => { const b = t.getBoundingClientRect();
      return [t.textContent, b.left, b.top, b.right, b.bottom]; }));
  const outcome = {
    first: shown(), labels, filters: form.getBoundingClientRect().height,
    lines: [...document.querySelectorAll(".trends figure:not([hidden]) .curve")].map((line) => line.getBBox().width),
    marks: document.querySelectorAll(".trends figure:not([hidden]) g.change").length,
    everything: choose({metric: "", model: "", entry: ""}),
    one: choose({metric: "latency_ms", model: "final", entry: "tiny"}),
    changed: choose({metric: "*main", model: "final", entry: "", changed: true}),
    overflow: document.documentElement.scrollWidth - innerWidth, width: innerWidth,
    dark: getComputedStyle(document.body).backgroundColor,
    resources: performance.getEntriesByType("resource").map((entry) => entry.name),
  };
  const out = document.createElement("pre");
  out.id = "outcome";
  out.textContent = JSON.stringify(outcome);
  document.body.append(out);
});
</script>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    history = nights.story(tmp_path_factory.mktemp("story") / "history.sqlite")
    read = history.nights(nights.SUITE)
    return night_page(read[-1], read, history.series(nights.SUITE), "Invented nights.")


Visit = Callable[..., tuple[str, str]]


@pytest.fixture
def visit(chromium: str, asked: tuple[int, list[bytes]], tmp_path: Path) -> Visit:
    """Loads a page and gives (document as the browser has it, what the browser logged)."""

    def load(content: str, *options: str) -> tuple[str, str]:
        file = tmp_path / "night.html"
        file.write_text(content, encoding="utf-8")
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
            "--enable-logging=stderr", "--log-level=0", f"--user-data-dir={tmp_path / 'profile'}",
            f"--proxy-server=http://127.0.0.1:{asked[0]}", "--proxy-bypass-list=<-loopback>",
            "--virtual-time-budget=2000", "--hide-scrollbars", *options, "--dump-dom", file.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        return done.stdout, done.stderr

    return load


def probed(visit: Visit, page: str, *options: str) -> dict[str, Any]:
    """What the probe found; it is let in by `unsafe-inline` in place of the digests."""
    let_in = re.sub(r"(style|script)-src 'sha256-[^']+'", r"\1-src 'unsafe-inline'", page)
    assert let_in != page
    document, log = visit(let_in.replace("</body>", PROBE + "</body>"), *options)
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    found = re.search(r'<pre id="outcome">(.*?)</pre>', document, re.S)
    assert found is not None
    content = json.loads(unescape(found[1]))
    assert isinstance(content, dict)
    return content


def test_the_page_as_shipped_runs_without_error_or_request(
    visit: Visit, page: str, asked: tuple[int, list[bytes]]
) -> None:
    document, log = visit(page)
    assert [line for line in log.splitlines() if "CONSOLE" in line] == []
    assert "8 of 12 lines" in document  # the script ran under the page's own policy
    own = re.compile(rb"^\S+ (\w+://)?(?!fonts)[\w-]+\.(google\.com|googleapis\.com|gvt1\.com)")
    assert [request for request in asked[1] if not own.match(request)] == []


def test_an_injection_does_nothing(visit: Visit, page: str) -> None:
    document, log = visit(page.replace("</body>", "<script>document.title='owned'</script></body>"))
    assert "<title>owned" not in document
    assert len([line for line in log.splitlines() if "CONSOLE" in line and "Content Security Policy" in line]) == 1


def test_lines_are_drawn_and_filtered(visit: Visit, page: str) -> None:
    found = probed(visit, page, "--window-size=1280,900")
    metrics = ("accuracy", "latency_ms", "size_bytes", "throughput")
    assert sorted(found["first"]) == sorted(
        f"{entry} {metric} final" for entry in ("tiny", "narrow") for metric in metrics
    )
    assert len(found["everything"]) == 12
    assert found["one"] == ["tiny latency_ms final"]
    # All but the accuracy of `narrow` changed in the story.
    assert sorted(found["changed"]) == sorted(set(found["first"]) - {"narrow accuracy final"})
    assert found["filters"] > 30
    assert all(width > 300 for width in found["lines"])
    assert found["marks"] >= 9
    assert found["resources"] == []


@pytest.mark.parametrize("width", [1280, 500])
def test_nothing_overflows_and_no_label_covers_another(visit: Visit, page: str, width: int) -> None:
    found = probed(visit, page, f"--window-size={width},900")
    assert (found["width"], found["overflow"]) == (width, 0)
    for chart in found["labels"]:
        for place, (name, left, top, right, bottom) in enumerate(chart):
            assert left >= 0
            assert right <= width
            for other, left2, top2, right2, bottom2 in chart[place + 1 :]:
                across = min(right, right2) - max(left, left2)
                down = min(bottom, bottom2) - max(top, top2)
                assert across <= 0 or down <= 4, f"{name!r} covers {other!r} by {across:.0f} x {down:.0f}"


def test_dark_mode_is_dark(visit: Visit, page: str) -> None:
    light = probed(visit, page)["dark"]
    dark = probed(visit, page, "--blink-settings=preferredColorScheme=0")["dark"]
    assert (light, dark) == ("rgb(245, 246, 248)", "rgb(15, 18, 23)")
