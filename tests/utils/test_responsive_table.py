"""Tables for terminals: no word broken, and what has no room named."""

from __future__ import annotations

from hypothesis import given, strategies
from narrow import shown

from compress.utils.responsive_table import ResponsiveTable, TableColumn


def table(*rows: tuple[str, ...]) -> ResponsiveTable:
    table_shown = ResponsiveTable(
        "",
        [TableColumn("name"), TableColumn("value", right=True), TableColumn("why", rank=2), TableColumn("n", rank=1)],
    )
    for row in rows:
        table_shown.add(*row)
    return table_shown


def lines(made: ResponsiveTable, width: int) -> list[str]:
    return [line.rstrip() for line in shown(made, width).splitlines()]


def test_columns_are_left_out_by_their_ranks_and_named() -> None:
    table_shown = table(("first_one", "1.25 ms", "because", "7"))
    assert lines(table_shown, 40)[0] == "name         value  why      n"
    assert lines(table_shown, 28)[0] == lines(table_shown, 22)[0] == "name         value  n"
    assert lines(table_shown, 22) == [
        "name         value  n",
        "\u2500" * 21,
        "first_one  1.25 ms  7",
        "why: hidden for lack",
        "of space",
    ]


def test_words_go_to_further_lines_and_figures_stay_whole() -> None:
    table_shown = table(("a name of words", "1.25 ms", "", ""))
    assert lines(table_shown, 14)[2:5] == ["a      1.25 ms", "name", "of"]


def test_names_are_broken_at_joints_where_nothing_else_helps() -> None:
    table_shown = table(("time_per_output_token", "1", "", ""))
    assert [line.split() for line in lines(table_shown, 16)[2:5]] == [["time_per_", "1"], ["output_"], ["token"]]


@given(strategies.lists(strategies.text("abc _/", max_size=30), min_size=1, max_size=4), strategies.integers(30, 120))
def test_every_letter_is_shown_and_no_line_is_too_long(names: list[str], width: int) -> None:
    table_shown = ResponsiveTable("", [TableColumn("name")])
    for name in names:
        table_shown.add(name)
    shown_lines = lines(table_shown, width)
    assert max(map(len, shown_lines)) <= width
    assert "".join("".join(shown_lines[2:]).split()) == "".join("".join(names).split())
