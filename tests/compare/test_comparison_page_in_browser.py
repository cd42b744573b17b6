"""The page of a gate in a real Chromium: drawn, readable at both widths, silent, and without a request."""

from __future__ import annotations

import json
import re
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from comparisons import accuracy, outcomes, report, row, time_row

from compress.compare.gate import gate
from compress.compare.reports import compare_reports
from compress.compare.views.html import html_gate
from compress.recipe.policy import Policy
from compress.report.schema import SliceRecord

pytestmark = pytest.mark.browser

PROBE = """
<script>
addEventListener("load", () => {
  const box = (node) => { const b = node.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; };
  const rows = [...document.querySelectorAll("table.changes tbody tr")].map((tr) => ({
    name: tr.cells[0].textContent, dot: box(tr.querySelector(".dot")), plot: box(tr.querySelector("svg.forest")),
    chip: box(tr.querySelector(".chip")), card: box(tr.closest(".card")),
    band: box(tr.querySelector(".band")), fill: getComputedStyle(tr.querySelector(".dot")).fill }));
  const out = document.createElement("pre");
  out.id = "outcome";
  out.textContent = JSON.stringify({ rows,
    labels: [...document.querySelectorAll("svg.head")].map((svg) =>
      [...svg.querySelectorAll("text")].map((t) => [t.textContent, ...box(t)])),
    overflow: document.documentElement.scrollWidth - innerWidth, page: getComputedStyle(document.body).backgroundColor,
    resources: performance.getEntriesByType("resource").map((entry) => entry.name) });
  document.body.append(out);
});
</script>
"""


@pytest.fixture(scope="module")
def page() -> str:
    """A gate with failures, an open question, passes and slices."""
    members = [i < 1000 for i in range(2000)]
    slices = {"first half": SliceRecord.of(members), "second half": SliceRecord.of([not m for m in members])}
    memory = row("peak_memory_bytes", 9e7, "bytes")
    before = report(
        accuracy(outcomes(1740)), row("size_bytes", 5_000_000, "bytes"), time_row("latency_ms", 2.0),
        time_row("startup_ms", 150.0, 0.3), memory, slices=slices,
    )  # fmt: skip
    after = report(
        accuracy(outcomes(1740, lost=60, gained=10)), row("size_bytes", 5_000_001, "bytes"),
        time_row("latency_ms", 2.6), time_row("startup_ms", 160.0, 0.3), memory, slices=slices,
    )  # fmt: skip
    policy = Policy()
    return html_gate(gate(compare_reports(before, after, policy, names=("baseline.json", "tonight")), policy))


def visit(chromium: str, content: str, folder: Path, *options: str) -> tuple[str, list[str]]:
    """The document as the browser has it, and what its console said."""
    path = folder / "gate.html"
    path.write_text(content, encoding="utf-8")
    command = [
        chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr",
        "--disable-background-networking", "--disable-component-update", "--log-level=0", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=2000", *options, "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def probed(chromium: str, page: str, folder: Path, *options: str) -> dict[str, Any]:
    """What the probe found; it is let in by `unsafe-inline`, which means nothing beside a digest."""
    let_in = re.sub(r"(style|script)-src 'sha256-[^']+'", r"\1-src 'unsafe-inline'", page)
    assert let_in != page
    document, console = visit(chromium, let_in.replace("</body>", PROBE + "</body>"), folder, *options)
    assert console == []
    found = re.search(r'<pre id="outcome">(.*?)</pre>', document, re.S)
    assert found is not None
    content: dict[str, Any] = json.loads(unescape(found[1]))
    return content


def test_the_page_as_shipped_is_silent(chromium: str, page: str, tmp_path: Path) -> None:
    document, console = visit(chromium, page, tmp_path)
    assert console == []
    assert 'id="tip"' in document  # the script ran under the page's own policy
    assert "Failed: accuracy" in document


@pytest.mark.parametrize("width", [1280, 500])
def test_every_row_is_drawn_inside_its_card(chromium: str, page: str, tmp_path: Path, width: int) -> None:
    found = probed(chromium, page, tmp_path, f"--window-size={width},900")
    assert found["overflow"] == 0
    assert found["resources"] == []
    assert len(found["rows"]) == 7
    for drawn in found["rows"]:
        left, _, right, _ = drawn["plot"]
        assert right - left > 150
        assert left - 6 <= drawn["dot"][0] <= drawn["dot"][2] <= right + 6
        assert drawn["card"][0] < drawn["chip"][0] < drawn["chip"][2] <= drawn["card"][2]
    accuracy_row = found["rows"][0]
    assert accuracy_row["name"].startswith("accuracy")
    assert accuracy_row["dot"][0] > accuracy_row["band"][2]  # worse than the margin: right of the band


def test_tick_labels_keep_apart(chromium: str, page: str, tmp_path: Path) -> None:
    found = probed(chromium, page, tmp_path, "--window-size=1280,900")
    assert sum(map(len, found["labels"])) >= 12
    for head in found["labels"]:
        for place, (name, left, top, right, bottom) in enumerate(head):
            for other, left2, top2, right2, bottom2 in head[place + 1 :]:
                across, down = min(right, right2) - max(left, left2), min(bottom, bottom2) - max(top, top2)
                assert across <= 0 or down <= 4, f"{name!r} covers {other!r}"


def test_dark_mode_is_dark(chromium: str, page: str, tmp_path: Path) -> None:
    light = probed(chromium, page, tmp_path)
    dark = probed(chromium, page, tmp_path, "--blink-settings=preferredColorScheme=0")
    assert (light["page"], dark["page"]) == ("rgb(245, 246, 248)", "rgb(15, 18, 23)")
    assert light["rows"][0]["fill"] != dark["rows"][0]["fill"]
