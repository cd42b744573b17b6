"""The page of a profile in a real Chromium: drawn at both widths, sortable, silent, and without a request."""

from __future__ import annotations

import json
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import profiles
import pytest

from compress.report.profile_page import profile_page

pytestmark = pytest.mark.browser

PROBE = """
<script>
addEventListener("load", () => {
  const box = (node) => { const b = node.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const first = document.querySelector("table.sortable");
  [...first.querySelectorAll("th button")].find((button) => button.textContent === "Time").click();
  const chart = document.querySelector("svg.chart");
  const out = document.createElement("pre");
  out.id = "outcome";
  out.textContent = JSON.stringify({
    rising: [...first.tBodies[0].rows].map((row) => row.cells[0].textContent),
    chart: box(chart), dots: [...chart.querySelectorAll("circle")].map(box),
    fills: [...chart.querySelectorAll("circle")].map((dot) => getComputedStyle(dot).fill),
    roofs: [...chart.querySelectorAll("line.roof")].map((line) => getComputedStyle(line).stroke),
    labels: [...chart.querySelectorAll("text.label")].map((label) => [label.textContent, ...box(label)]),
    overflow: document.documentElement.scrollWidth - innerWidth, page: getComputedStyle(document.body).backgroundColor,
    resources: performance.getEntriesByType("resource").map((entry) => entry.name) });
  document.body.append(out);
});
</script>
"""


def visit(chromium: str, folder: Path, content: str, *options: str) -> tuple[str, list[str]]:
    """The document as the browser has it, and what its console said."""
    (folder / "page.html").write_text(content, encoding="utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--log-level=0",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", "--hide-scrollbars", *options,
        "--dump-dom", (folder / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def outcome(chromium: str, folder: Path, *options: str) -> dict[str, Any]:
    """What the probe found; `unsafe-inline` lets it in, which means nothing beside a digest, so replaces it."""
    page = profile_page(profiles.profile())
    let_in = re.sub(r"(style|script)-src 'sha256-[^']+'", r"\1-src 'unsafe-inline'", page)
    assert let_in != page
    document, said = visit(chromium, folder, let_in.replace("</body>", PROBE + "</body>"), *options)
    assert said == []
    found = re.search(r'<pre id="outcome">(.*?)</pre>', document, re.S)
    assert found is not None
    content = json.loads(unescape(found[1]))
    assert isinstance(content, dict)
    return content


def test_as_shipped_it_runs_under_its_own_policy(chromium: str, tmp_path: Path) -> None:
    document, said = visit(chromium, tmp_path, profile_page(profiles.profile()))
    assert said == []
    assert 'id="tip"' in document and document.count("<button") > 20


@pytest.mark.parametrize("width", [1200, 400])
def test_everything_is_drawn_within_the_page(chromium: str, tmp_path: Path, width: int) -> None:
    found = outcome(chromium, tmp_path, f"--window-size={max(width, 500)},1400")
    assert found["overflow"] <= 0
    assert found["resources"] == []
    left, top, right, bottom = found["chart"]
    assert right - left > 300 and bottom - top > 200
    assert len(found["dots"]) == 2
    for x1, y1, x2, y2 in found["dots"]:
        assert left <= x1 < x2 <= right and top <= y1 < y2 <= bottom
    assert {label[0] for label in found["labels"]} == {"whole model", "MatMul", "DynamicQuantizeMatMul"}
    boxes = [label[1:] for label in found["labels"]]
    for i, one in enumerate(boxes):
        for other in boxes[i + 1 :]:
            assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    assert len(set(found["fills"])) == 2, "8-bit and float products have colours of their own"
    assert len(found["roofs"]) == 4 and len(set(found["roofs"])) >= 3


def test_a_table_sorts_by_time(chromium: str, tmp_path: Path) -> None:
    rising = outcome(chromium, tmp_path)["rising"]
    assert set(rising[:2]) == {"Gather", "Einsum"}
    assert rising[2:] == ["DynamicQuantizeMatMul", "MatMul"]


def test_it_follows_the_system_into_the_dark(chromium: str, tmp_path: Path) -> None:
    dark = outcome(chromium, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert dark["page"] == "rgb(15, 18, 23)"
