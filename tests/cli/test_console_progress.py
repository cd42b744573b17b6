"""Tests of progress output on a terminal and in a file."""

import io

from rich.console import Console

from compress.report.progress import ConsoleProgress


def test_terminal_shows_count_and_items_pass_through():
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, force_terminal=True, width=100))
    assert list(progress.track(iter("abc"), "letters [x]", 3)) == ["a", "b", "c"]
    assert "letters [x]" in out.getvalue()
    assert "3/3" in out.getvalue()


def test_file_output_has_notes_only():
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, width=40, soft_wrap=True))
    assert list(progress.track(range(3), "numbers", 3)) == [0, 1, 2]
    progress.note("[not markup] " + "a long line " * 5)
    assert out.getvalue() == "[not markup] " + "a long line " * 5 + "\n"


def test_file_output_reports_progress_after_five_seconds_and_every_half_minute():
    out, times = io.StringIO(), iter([0.0, 4.0, 8.0, 20.0, 40.0, 50.0])
    progress = ConsoleProgress(Console(file=out, width=80), clock=lambda: next(times))
    assert list(progress.track("abcde", "letters", 5)) == list("abcde")
    assert out.getvalue() == "letters: 2 of 5, about 12.0 s left\nletters: 4 of 5, about 10.0 s left\n"


def test_expected_step_count_is_updated_while_running():
    out, times, expected = io.StringIO(), iter([0.0, 20.0, 40.0, 60.0, 80.0]), iter([9, 6, 4, 4])
    progress = ConsoleProgress(Console(file=out, width=80), clock=lambda: next(times))
    assert list(progress.track("abcd", "letters", lambda: next(expected))) == list("abcd")
    assert out.getvalue() == "letters: 1 of 9, about 2 min 40 s left\nletters: 3 of 4, about 20.0 s left\n"
    terminal = ConsoleProgress(Console(file=out, force_terminal=True, width=100))
    assert list(terminal.track("ab", "words", lambda: 2)) == ["a", "b"] and "2/2" in out.getvalue()
