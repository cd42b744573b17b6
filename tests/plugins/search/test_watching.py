"""The table that a search shows while it runs, on a terminal of any width; lines for everybody else."""

from __future__ import annotations

import io
import re

import made_up_record
import pytest
from rich.cells import cell_len
from rich.console import Console

from compress.plugins.search.acquisition import Expectation
from compress.plugins.search.console import LiveTable
from compress.plugins.search.live_progress import SearchConsole
from compress.plugins.search.progress import RunningTrial, SearchSnapshot

TRYING = RunningTrial(6, "prune.heads 0.5, distill.student.layers [2]", 1 / 3, "most gain for its time",
                Expectation(0.12, 0.71, 130.0), 100.0)  # fmt: skip


def seen(*trying: RunningTrial, doing: str = "") -> SearchSnapshot:
    return SearchSnapshot(made_up_record.record(), trying, 1800.0, 100.0, doing)


def drawn(moment: SearchSnapshot, width: int = 80, now: float = 142.0) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(LiveTable(moment, clock=lambda: now))
    return out.getvalue()


def test_it_says_what_is_best_what_is_tried_why_and_how_much_time_is_left() -> None:
    text = " ".join(drawn(seen(TRYING)).split())
    assert "size on disk 4.80 MB, latency 0.480 ms (0.436\u20130.533 ms)" in text
    assert "accuracy at least 0.97: +1.20% inside, surely +0.20%" in text
    assert "trial 6, 33% of its training, for 0:42: prune.heads 0.5, distill.student.layers [2]" in text
    assert "12.0% to win, 71% to keep the limits on quality, about 2 min 10 s to its end" in text
    assert "6 done, 6 of 96 recipes: 4 in full, 1 ended early, 1 failed" in text
    assert "29:18 for trials, of 1:00:00 for all" in text
    assert "the session at the end" in drawn(seen(doing="the session at the end"))


def test_of_two_figures_the_front_is_listed_and_of_one_it_is_not() -> None:
    rows = [line.split()[:5] for line in drawn(seen(TRYING)).splitlines() if re.match(r"\d ", line)]
    assert rows == [["1", "4.80", "MB", "0.480", "ms"], ["4", "6.00", "MB", "0.400", "ms"]]
    alone = SearchSnapshot(made_up_record.record(minimize=("size_bytes",)), (), 0.0, 0.0)
    assert "front" not in drawn(alone)


def test_before_anything_keeps_the_limits_it_says_what_is_nearest() -> None:
    trials = tuple(trial.model_copy(update={"status": "missed"}) for trial in made_up_record.record().trials)
    moment = SearchSnapshot(made_up_record.record(trials=trials, best=None, nearest="short by 3%"), (), 0.0, 0.0)
    assert "nothing keeps every limit yet. Nearest: short by 3%" in " ".join(drawn(moment).split())


@pytest.mark.parametrize("width", [30, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert max(map(cell_len, drawn(seen(TRYING), width).splitlines())) <= width


def test_a_file_gets_lines_and_so_does_json() -> None:
    for console, lines in ((Console(file=io.StringIO()), False), (terminal(io.StringIO()), True)):
        with SearchConsole(console, lines) as shown:
            shown.show(seen(TRYING))
            shown.note("a line")
            assert list(shown.track("ab", "letters", 2)) == ["a", "b"]
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "a line" in text
        assert "best" not in text


class Terminal:
    """As much of one as it takes: lines that wrap anew when it becomes narrower, and a cursor that goes up."""

    def __init__(self, written: str, width: int) -> None:
        self.lines, self.row, self.width = [""], 0, width
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
        """The same, as wide as that: lines that don't fit are wrapped, and the cursor stays in its text."""
        wrapped = [[line[at : at + width] for at in range(0, max(len(line), 1), width)] for line in self.lines]
        other = Terminal("", width)
        other.lines = [piece for line in wrapped for piece in line]
        other.row = sum(map(len, wrapped[: self.row + 1])) - 1
        return other


def terminal(out: io.StringIO, width: int = 80) -> Console:
    return Console(file=out, force_terminal=True, force_interactive=True, width=width, height=60, color_system=None)


def test_a_terminal_that_becomes_narrower_has_the_table_once_and_keeps_what_stood_above() -> None:
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
    for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", out.getvalue()):
        narrow._put(part)
    text = [line.rstrip() for line in narrow.lines]
    assert text[0] == "a note that was there before"
    assert sum("the front" in line for line in text) == 1
    assert sum("now " in line for line in text) == 1
    assert text.index("a note after") > next(
        line_number for line_number, line in enumerate(text) if line.startswith("left")
    )


def test_bars_run_below_the_table_and_go_away() -> None:
    out = io.StringIO()
    with SearchConsole(terminal(out)) as shown:
        shown.show(seen(TRYING))
        for step, _ in enumerate(shown.track("ab", "evaluate final", 2)):
            shown.show(seen(TRYING))
            assert f"{step}/2" in out.getvalue()
        out.truncate(0), out.seek(0)
        shown.show(seen(TRYING))
        assert "evaluate final" not in out.getvalue()
