import io

from rich.console import Console

from compress.cli.output import ConsoleProgress


def test_items_pass_while_a_terminal_sees_the_count():
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, force_terminal=True, width=100))
    assert list(progress.track(iter("abc"), "letters [x]", 3)) == ["a", "b", "c"]
    assert "letters [x]" in out.getvalue()
    assert "3/3" in out.getvalue()


def test_a_file_gets_the_notes_alone():
    out = io.StringIO()
    progress = ConsoleProgress(Console(file=out, width=40, soft_wrap=True))
    assert list(progress.track(range(3), "numbers", 3)) == [0, 1, 2]
    progress.note("[not markup] " + "a long line " * 5)
    assert out.getvalue() == "[not markup] " + "a long line " * 5 + "\n"


def test_a_file_is_told_every_half_minute_how_far_long_work_is():
    out, times = io.StringIO(), iter([0.0, 20.0, 40.0, 60.0, 80.0])
    progress = ConsoleProgress(Console(file=out, width=80), clock=lambda: next(times))
    assert list(progress.track("abcd", "letters", 4)) == list("abcd")
    assert out.getvalue() == "letters: 2 of 4, about 40.0 s left\n"


def test_where_a_clock_ends_the_steps_their_number_is_asked_for_anew():
    out, times, expected = io.StringIO(), iter([0.0, 20.0, 40.0, 60.0, 80.0]), iter([9, 6, 4, 4])
    progress = ConsoleProgress(Console(file=out, width=80), clock=lambda: next(times))
    assert list(progress.track("abcd", "letters", lambda: next(expected))) == list("abcd")
    assert out.getvalue() == "letters: 2 of 6, about 1 min 20 s left\n"
    terminal = ConsoleProgress(Console(file=out, force_terminal=True, width=100))
    assert list(terminal.track("ab", "words", lambda: 2)) == ["a", "b"] and "2/2" in out.getvalue()
