"""The page in a real Chromium: drawn, without errors, and without a request."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.report.html import html_page
from compress.report.schema import Report

pytestmark = pytest.mark.browser

# Appended to a copy of the page, which admits it by `unsafe-inline`: it writes what the browser laid out into
# an element that --dump-dom returns.
PROBE = """
<script>
addEventListener("load", () => {
  const size = (node) => { const box = node.getBoundingClientRect(); return [box.width, box.height]; };
  const buttons = [...document.querySelectorAll("table.sortable th button")];
  const sorter = buttons.find((button) => button.textContent === "Accuracy");
  const order = () => [...sorter.closest("table").tBodies[0].rows].map((row) => row.cells[0].textContent);
  sorter.click();
  const rising = order();
  sorter.click();
  const labels = [...document.querySelectorAll("svg.chart")].map((svg) =>
    [...svg.querySelectorAll("text")].map((t) => { const b = t.getBoundingClientRect();
      return [t.textContent, b.left, b.top, b.right, b.bottom]; }));
  const outcome = {
    svgs: [...document.querySelectorAll("svg")].filter((s) => !s.closest("details")).map(size),
    labels, rising, falling: order(),
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


Visit = Callable[..., tuple[str, str]]


@pytest.fixture
def visit(chromium: str, asked: tuple[int, list[bytes]], tmp_path: Path) -> Visit:
    """Loads a page and gives (document as the browser has it, what the browser logged)."""

    def load(content: str, *options: str) -> tuple[str, str]:
        page = tmp_path / "report.html"
        page.write_text(content, encoding="utf-8")
        command = [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
            "--disable-features=OptimizationHints,MediaRouter", "--enable-logging=stderr", "--log-level=0",
            f"--user-data-dir={tmp_path / 'profile'}", f"--proxy-server=http://127.0.0.1:{asked[0]}",
            "--proxy-bypass-list=<-loopback>", "--virtual-time-budget=2000", "--hide-scrollbars",
            *options, "--dump-dom", page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
        return done.stdout, done.stderr

    return load


def strangers(requests: list[bytes]) -> list[str]:
    """The addresses asked for, without those of Chromium's own update and clock services."""
    asked = [request.split(b" ", 2)[1].decode() for request in requests if request.count(b" ") >= 2]
    hosts = [re.sub(r"^\w+://|[:/].*$", "", address.split("://")[-1]) for address in asked]
    own = re.compile(r"^(?!fonts)[\w-]+\.(google\.com|googleapis\.com|gvt1\.com)$")
    return [host for host in hosts if not own.match(host)]


def console_lines(log: str) -> list[str]:
    return [line for line in log.splitlines() if "CONSOLE" in line]


def probed(content: str) -> str:
    """The page with the probe let in; `unsafe-inline` means nothing beside a digest, so replaces it."""
    let_in = re.sub(r"(style|script)-src 'sha256-[^']+'", r"\1-src 'unsafe-inline'", content)
    assert let_in != content
    return let_in.replace("</body>", PROBE + "</body>")


def outcome(document: str) -> dict[str, object]:
    found = re.search(r'<pre id="outcome">(.*?)</pre>', document, re.S)
    assert found is not None
    from html import unescape

    content = json.loads(unescape(found[1]))
    assert isinstance(content, dict)
    return content


def test_the_page_as_shipped_runs_without_error_or_request(
    visit: Visit, report: Report, asked: tuple[int, list[bytes]]
) -> None:
    document, log = visit(html_page(report))
    assert console_lines(log) == []
    assert 'id="tip"' in document  # the script ran under the page's own policy
    assert document.count("<button") > 10
    assert "1 of 4 limits missed" in document
    assert strangers(asked[1]) == []


def test_the_policy_stops_what_an_injection_would_do(
    visit: Visit, report: Report, asked: tuple[int, list[bytes]]
) -> None:
    injected = "<script>document.title='owned'</script><img src='http://leak.invalid/report'>"
    document, log = visit(html_page(report).replace("</body>", injected + "</body>"))
    assert "<title>owned" not in document
    assert len([line for line in console_lines(log) if "Content Security Policy" in line]) == 2
    assert strangers(asked[1]) == []


def test_an_unguarded_request_would_be_seen(visit: Visit, asked: tuple[int, list[bytes]]) -> None:
    visit("<!doctype html><img src='http://seen.invalid/x'>")
    assert strangers(asked[1]) == ["seen.invalid"]
    asked[1].clear()


def test_everything_is_drawn_and_sorts(visit: Visit, report: Report) -> None:
    document, log = visit(probed(html_page(report)), "--window-size=1280,900")
    assert console_lines(log) == []
    found = outcome(document)
    sizes = found["svgs"]
    assert isinstance(sizes, list)
    assert len(sizes) > 20
    assert all(width > 20 and height > 5 for width, height in sizes)
    assert found["resources"] == []
    right = {
        "distill": 1752,
        "baseline": 1746,
        "prune": 1741,
        "quantize": 1737,
    }  # as the fixture invents them
    rising = [name for name in found["rising"] if name in right]  # type: ignore[attr-defined]
    assert rising == sorted(right, key=lambda name: right[name])
    assert [name for name in found["falling"] if name in right] == rising[::-1]  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [1280, 500])
def test_no_label_covers_another(visit: Visit, report: Report, width: int) -> None:
    document, _ = visit(probed(html_page(report)), f"--window-size={width},900")
    found = outcome(document)
    assert found["width"] == width
    assert found["overflow"] == 0
    for chart in found["labels"]:  # type: ignore[attr-defined]
        for place, (name, left, top, right, bottom) in enumerate(chart):
            for other, left2, top2, right2, bottom2 in chart[place + 1 :]:
                across = min(right, right2) - max(left, left2)
                down = min(bottom, bottom2) - max(top, top2)
                # A glyph box holds some empty space above and below its letters.
                assert across <= 0 or down <= 4, f"{name!r} covers {other!r} by {across:.0f} x {down:.0f}"


def test_dark_mode_is_dark(visit: Visit, report: Report) -> None:
    light = outcome(visit(probed(html_page(report)))[0])["dark"]
    dark = outcome(visit(probed(html_page(report)), "--blink-settings=preferredColorScheme=0")[0])["dark"]
    assert (light, dark) == ("rgb(245, 246, 248)", "rgb(15, 18, 23)")
