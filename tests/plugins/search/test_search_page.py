"""The page of a search in a real browser: every trial, what is infeasible, what choices matter, what was shared."""

from __future__ import annotations

import re

import made_up_record
import pytest
from browser import BOX, Browser

from compress.plugins.search.html_report import search_page, stage_tree
from compress.plugins.search.pareto_chart import pareto_chart


def test_every_stage_stands_once_below_what_it_follows_with_what_sharing_saved() -> None:
    shown = stage_tree(made_up_record.record())
    assert [(one.depth, one.label, one.trials, one.seconds, one.saved) for one in shown] == [
        (0, "finetune", 5, 60.0, 240.0),
        (1, "distill", 3, 30.0, 60.0),
        (2, "quantize", 1, 5.0, 0.0),
        (2, "quantize", 1, 5.0, 0.0),
        (2, "quantize", 1, 5.0, 0.0),
        (1, "distill", 2, 30.0, 30.0),
        (2, "quantize", 1, 5.0, 0.0),
        (2, "quantize", 1, 5.0, 0.0),
    ]
    assert shown[0].numbers == "0, 1, 2, 3, 4"


def test_what_a_limit_forbids_is_tinted_from_the_bound_on() -> None:
    """Against quality, all below the bound too; of two figures what is too large."""
    both, one = (pareto_chart(made_up_record.record(minimize=names))
                 for names in (("size_bytes", "latency_ms"), ("size_bytes",)))  # fmt: skip
    assert both.count("infeasible") == 1
    assert one.count("infeasible") == 2
    free = made_up_record.record(bounds={"size_bytes": 8e8})
    assert "infeasible" not in pareto_chart(free), "what lies far outside says nothing"


def test_the_chart_needs_two_trials() -> None:
    assert pareto_chart(made_up_record.record(trials=made_up_record.record().trials[:1])) == ""


def test_a_choice_says_what_it_explains_or_why_nobody_knows() -> None:
    page = search_page(made_up_record.record())
    assert "Size on disk: 80% of the variance, means up to 1.9 times as large" in page
    assert "Accuracy: too few to say: 4 recipes" in page
    assert "tried with one value" in page
    assert "Hutter et al. 2014" in page


_PROBE = f"""
{BOX}
const marks = [...document.querySelectorAll(".chart g[tabindex]")];
marks[0].dispatchEvent(new PointerEvent("pointerenter"));
const tinted = box(document.querySelector(".infeasible"));
const winner = box(document.querySelector(".final .mark"));
const start = box(document.querySelector(".baseline .mark"));
const lines = [...document.querySelectorAll(".point")].map((one) => one.querySelectorAll(".interval").length);
return {{tips: marks.map((one) => one.getAttribute("aria-label")), tip: document.querySelector("#tip").textContent,
  wide: document.documentElement.scrollWidth - innerWidth, tinted, winner, start, lines,
  ink: getComputedStyle(document.body).color}};
"""


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_a_reader_sees_every_trial_on_hover_and_what_is_infeasible(browser: Browser, width: int, dark: bool) -> None:
    record = made_up_record.record()
    seen = browser.look(search_page(record), _PROBE.replace(BOX, ""), width=width, dark=dark)
    assert seen.said == []
    assert seen.asked == []
    found = seen.found
    assert found["wide"] <= 0
    numbers = sorted(int(re.match(r"trial (\d+)", tip)[1]) for tip in found["tips"])  # type: ignore[index]
    assert numbers == [0, 1, 2, 3, 4], "all that have figures"
    tip = next(tip for tip in found["tips"] if tip.startswith("trial 3"))
    assert tip == (
        "trial 3, 11% of its training: prune.heads 0.5\nSize on disk: 3.00 MB\nLatency: 0.300 ms\n"
        "accuracy at least 0.97: -9.00% inside, surely -10.00%\ntried because: most gain for its time\n"
        "given up: it would end -9.0% inside"
    )
    assert found["tip"] in found["tips"]
    left, right = found["tinted"][0], found["tinted"][2]
    assert left < (found["start"][0] + found["start"][2]) / 2 < right, "9 MB, where 8 are allowed"
    assert found["winner"][2] < left
    assert found["lines"] == [3] * 5, "an interval with both its ends"
    bright = sum(map(int, re.findall(r"\d+", found["ink"])[:3])) > 380
    assert bright == dark
