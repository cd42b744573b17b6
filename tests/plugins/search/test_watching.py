"""Tests of the live table, ledger, search page and importance analysis."""

from __future__ import annotations

import errno
import io
import itertools
import os
import random
import re
from pathlib import Path

import made_up_record
import numpy as np
import pytest
import tiny_run
from browser import BOX, Browser
from rich.cells import cell_len
from rich.console import Console
from tiny_generation import write_all

from compress.plugins.search.acquisition import Expectation
from compress.plugins.search.console import LiveTable, RunningTrial, SearchConsole, SearchSnapshot
from compress.plugins.search.html_report import pareto_chart, search_page, stage_tree
from compress.plugins.search.observations import Ledger, LedgerEntry, LedgerHeader
from compress.plugins.search.outcome import TrialOutcome
from compress.plugins.search.shape_inference import stages_key
from compress.plugins.search.space import SearchParameter
from compress.plugins.search.surrogate import analyze_importance
from compress.stages.protocols import model_checks
from compress.utils.errors import InputError, StorageError

TRYING = RunningTrial(6, "prune.heads 0.5, distill.student.layers [2]", 1 / 3, "largest expected gain per time",
                Expectation(0.12, 0.71, 130.0), 100.0)  # fmt: skip


def seen(*trying: RunningTrial, doing: str = "") -> SearchSnapshot:
    return SearchSnapshot(made_up_record.record(), trying, 1800.0, 100.0, doing)


def drawn(moment: SearchSnapshot, width: int = 80, now: float = 142.0) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(LiveTable(moment, clock=lambda: now))
    return out.getvalue()


def test_table_shows_best_and_running_trials_and_remaining_time() -> None:
    text = " ".join(drawn(seen(TRYING)).split())
    assert "size on disk 4.80 MB, latency 0.480 ms (0.436\u20130.533 ms)" in text
    assert "accuracy at least 0.97: +1.20% inside, surely +0.20%" in text
    assert "trial 6, 33% of its training, for 0:42: prune.heads 0.5, distill.student.layers [2]" in text
    assert "29:18 for trials, of 1:00:00 for all" in text
    # With two objectives the Pareto front is listed.
    assert "1 4.80 MB 0.480 ms" in text and "4 6.00 MB 0.400 ms" in text
    trials = [trial.model_copy(update={"status": "missed"}) for trial in made_up_record.record().trials]
    record = made_up_record.record(minimize=("size_bytes",), trials=trials, best=None, nearest="short by 3%")
    text = drawn(SearchSnapshot(record, (), 0.0, 0.0))
    assert "front" not in text and "Nearest: short by 3%" in text


@pytest.mark.parametrize("width", [30, 80, 200])
def test_table_fits_the_terminal_width(width: int) -> None:
    assert max(map(cell_len, drawn(seen(TRYING), width).splitlines())) <= width


def test_files_and_json_output_get_lines_without_table() -> None:
    for console, lines in ((Console(file=io.StringIO()), False), (terminal(io.StringIO()), True)):
        with SearchConsole(console, lines) as shown:
            shown.show(seen(TRYING))
            shown.note("a line")
            assert list(shown.track("ab", "letters", 2)) == ["a", "b"]
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "a line" in text and "best" not in text


class Terminal:
    """A minimal terminal emulator with cursor-up, clear-line and wrapping of lines when it becomes narrower."""

    def __init__(self, written: str, width: int) -> None:
        self.lines, self.row, self.width = [""], 0, width
        self.write(written)

    def write(self, written: str) -> None:
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
            self._put(part)

    def _put(self, part: str) -> None:
        if part == "\n":
            self.row += 1
            self.lines += [""] * (self.row + 1 - len(self.lines))
        elif part == "\x1b[1A":
            assert self.row > 0, "the cursor left the screen"
            self.row -= 1
        elif part == "\x1b[2K":
            self.lines[self.row] = ""
        elif part[0] not in "\x1b\r":
            self.lines[self.row] += part

    def narrowed(self, width: int) -> Terminal:
        """Return the terminal at a smaller width, with long lines wrapped and the cursor on the same text."""
        wrapped = [[line[at : at + width] for at in range(0, max(len(line), 1), width)] for line in self.lines]
        other = Terminal("", width)
        other.lines = [piece for line in wrapped for piece in line]
        other.row = sum(map(len, wrapped[: self.row + 1])) - 1
        return other


def terminal(out: io.StringIO, width: int = 80) -> Console:
    return Console(file=out, force_terminal=True, force_interactive=True, width=width, height=60, color_system=None)


def test_narrowed_terminal_shows_the_table_once_below_earlier_text() -> None:
    out = io.StringIO()
    console = terminal(out)
    with SearchConsole(console) as shown:
        shown.note("a note that was there before")
        shown.show(seen(TRYING))
        terminal_before = Terminal(out.getvalue(), 80)
        narrow = terminal_before.narrowed(50)
        out.truncate(0), out.seek(0)
        console.width = 50
        shown.show(seen(TRYING))
        shown.stop()
        shown.note("a note after")
    narrow.write(out.getvalue())
    text = "\n".join(line.rstrip() for line in narrow.lines)
    assert text.startswith("a note that was there before")
    assert text.count("the front") == text.count("\nnow ") == 1
    assert text.index("\na note after") > text.index("\nleft")


def header() -> LedgerHeader:
    return LedgerHeader(recipe={"name": "tiny"}, knobs=(("prune", (True, False)),), rungs=(1.0,), machine={"cores": 2})


def entry(number: int) -> LedgerEntry:
    outcome = TrialOutcome(final={"accuracy": 0.5}, seconds=1.5)
    return LedgerEntry(number=number, point=(number, 0), rung=0, words="prune", identity="abc", outcome=outcome)


def test_ledger_is_read_in_order_without_a_truncated_line(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.create(header())
    for number in range(3):
        whole = ledger.path.read_bytes()
        ledger.append(entry(number))
    assert Ledger(tmp_path).read() == (header(), [entry(number) for number in range(3)])
    ledger.path.write_bytes(ledger.path.read_bytes()[:-9])
    assert Ledger(tmp_path).read() == (header(), [entry(0), entry(1)])
    assert ledger.path.read_bytes() == whole


def test_full_disk_leaves_complete_ledger_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path)
    ledger.create(header())
    ledger.append(entry(0))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="full"):
            ledger.append(entry(1))
    assert Ledger(tmp_path).read()[1] == [entry(0)]
    ledger.append(entry(1))
    assert Ledger(tmp_path).read()[1] == [entry(0), entry(1)]


@pytest.mark.parametrize("content", [b"", b"{}\n", b'{"version": 1}\n', b"not json\n"])
def test_file_that_is_no_ledger_is_refused(tmp_path: Path, content: bytes) -> None:
    Ledger(tmp_path).path.write_bytes(content)
    with pytest.raises(InputError, match="start again"):
        Ledger(tmp_path).read()


def test_stage_tree_counts_shared_stages_and_saved_time() -> None:
    shown = stage_tree(made_up_record.record())
    quantized = (2, "quantize", 1, 5.0, 0.0)
    assert [(one.depth, one.label, one.trials, one.seconds, one.saved) for one in shown] == [
        (0, "finetune", 5, 60.0, 240.0), (1, "distill", 3, 30.0, 60.0), *[quantized] * 3,
        (1, "distill", 2, 30.0, 30.0), *[quantized] * 2,
    ]  # fmt: skip
    assert shown[0].numbers == "0, 1, 2, 3, 4"


def test_chart_tints_the_region_beyond_a_limit() -> None:
    """A chart of size against accuracy has two infeasible regions here, a chart of size against latency one."""
    assert pareto_chart(made_up_record.record()).count("infeasible") == 1
    assert pareto_chart(made_up_record.record(minimize=("size_bytes",))).count("infeasible") == 2
    free = made_up_record.record(bounds={"size_bytes": 8e8})
    assert "infeasible" not in pareto_chart(free), "what lies far outside says nothing"

    assert pareto_chart(made_up_record.record(trials=made_up_record.record().trials[:1])) == "", "it needs two trials"


def test_choices_tried_with_one_value_share_one_line() -> None:
    """A row for each would have nothing to show."""
    page = search_page(made_up_record.record())
    assert "Tried with one value, so their effect is unknown: trim_vocabulary</p>" in page
    assert '<th scope="row">trim_vocabulary</th>' not in page
    assert '<th scope="row">stages.1.prune.heads</th>' in page


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
def test_search_page_shows_trials_on_hover_and_infeasible_region(browser: Browser, width: int, dark: bool) -> None:
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
        "accuracy at least 0.97: -9.00% inside, surely -10.00%\ntried because: largest expected gain per time\n"
        "given up: it would end -9.0% inside"
    )
    assert found["tip"] in found["tips"]
    left, right = found["tinted"][0], found["tinted"][2]
    assert left < (found["start"][0] + found["start"][2]) / 2 < right, "9 MB, where 8 are allowed"
    assert found["winner"][2] < left
    assert found["lines"] == [3] * 5, "an interval with both its ends"
    bright = sum(map(int, re.findall(r"\d+", found["ink"])[:3])) > 380
    assert bright == dark


KNOBS = (
    SearchParameter("stages.1.distill.width", (4, 3, 2, 1), 1),
    SearchParameter("stages.2.onnx_int8.bits", (8, 4), 2),
    SearchParameter("stages.2.onnx_int8.kind", ("a", "b"), 2),
)
EVERY = list(itertools.product(range(4), range(2), range(2)))


def test_importance_equals_variance_shares_of_an_additive_function() -> None:
    """f = 3 rank + 2 bit over the whole space: the variance of ranks 0, 1/3, 2/3, 1 is 5/36, that of a bit 1/4."""
    points = random.Random(0).sample(EVERY, 14)
    values = np.array([3 * point[0] / 3 + 2 * point[1] for point in points], dtype=float)
    importance = analyze_importance(KNOBS, points, values)
    parts = [9 * 5 / 36, 4 * 1 / 4, 0.0]
    assert importance.shares is not None
    assert [part or 0.0 for part in importance.shares] == pytest.approx([part / sum(parts) for part in parts], abs=0.02)
    assert "by 14 recipes" in importance.note


def test_interactions_are_not_attributed_to_single_parameters() -> None:
    """f = 1 where the two values differ, so that neither parameter explains any variance alone."""
    points = [(0, 0), (0, 1), (1, 0), (1, 1)] * 3
    values = np.array([float(a != b) for a, b in points])
    importance = analyze_importance(KNOBS[1:], points, values)
    assert importance.shares is not None
    assert max(share or 0.0 for share in importance.shares) < 0.05
    assert "100% is due to interactions of choices" in importance.note


@pytest.mark.parametrize(
    ("points", "values", "says"),
    [
        (EVERY[:4], [1.0, 2.0, 3.0, 4.0], "too few to say: 4 recipes were trained in full, 6 are needed"),
        (EVERY[:8], [1.0] * 8, "have the same value"),
        (EVERY, list(np.random.default_rng(0).normal(size=16)), "too few to say: of 16 recipes, each predicted"),
    ],
)
def test_too_few_trials_give_no_importance(points: list[tuple[int, ...]], values: list[float], says: str) -> None:
    importance = analyze_importance(KNOBS, points, np.array(values))
    assert importance.shares is None
    assert says in importance.note


def test_parameter_with_one_tried_value_has_no_importance() -> None:
    points = [point for point in EVERY if point[2] == 0]
    importance = analyze_importance(KNOBS, points, np.array([float(point[0]) for point in points]))
    assert importance.shares is not None
    assert importance.shares[2] is None
    assert importance.shares[0] == pytest.approx(1.0, abs=0.01)


def test_width_check_is_cached_by_the_pruning_before_it(tmp_path: Path) -> None:
    """The check depends on the pruned share, but not on the settings of equalize."""

    def known(share: float, strength: float) -> str:
        cuts = [{"prune_decoder": {"feed_forward": share}}, {"equalize": {"strength": strength}}]
        stages = [*cuts, {"gptq": {"group_size": 128}}, {"onnx": {}}]
        checks = model_checks(tiny_run.load(write_all(tmp_path, stages=stages)).stages)
        (found,) = (check for check in checks if check.of_widths and check.stages[-1].kind == "gptq")
        assert [stage.kind for stage in found.stages] == ["prune_decoder", "gptq"]
        return stages_key(found.stages)

    assert known(0.5, 0.5) == known(0.5, 0.7) != known(0.25, 0.5)
