"""Tables for a terminal of any width: columns that do not fit are hidden and named below the table."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

Split = Callable[[str], list[str]]
_GAP = 2
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_WORDS = re.compile(r"\s*\S+\s*|\s+")
"""Splits a text at spaces. An indented word keeps its indentation, which alone would be an empty line."""
_JOINTS = re.compile(r"\s*[^\s_/,=\[(.-]*[_/,=\[(.-]+\s*|\s*\S+\s*|\s+")
"""Splits a text after ``_``, ``/`` and similar characters, where splitting at spaces alone needs too much width."""


@dataclass(frozen=True)
class TableColumn:
    """Heading and alignment of a column.

    A column with ``right`` is aligned right and holds numbers, which are never wrapped. Columns of ``rank`` 0 are
    always shown; the others are added in the order of their ranks while there is room.
    """

    heading: str
    right: bool = False
    rank: int = 0


@dataclass
class ResponsiveTable:
    """Rows of cells below a title; a cell is a text, or a text with a style."""

    title: str
    columns: Sequence[TableColumn]
    left_out: str = "hidden for lack of space"
    """Explanation printed after the names of the hidden columns."""
    rows: list[tuple[Sequence[str | tuple[str, str]], str]] = field(default_factory=list)

    def add(self, *cells: str | tuple[str, str], style: str = "") -> None:
        """Add a row."""
        assert len(cells) == len(self.columns)
        self.rows.append((cells, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown, widths, split = self._layout(options.max_width)
        table = Table(
            title=Text(self.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False,
            pad_edge=False, padding=(0, 1, 0, 0),
        )  # fmt: skip
        for index in shown:
            column, width = self.columns[index], widths[index]
            heading = Text("\n".join(_wrapped(column.heading, width, split)))
            table.add_column(heading, justify="right" if column.right else "left", width=width, overflow="fold")
        for cells, style in self.rows:
            texts = []
            for index in shown:
                text, cell_style = _parts(cells[index])
                lines = [text] if self.columns[index].right else _wrapped(text, widths[index], split)
                texts.append(Text("\n".join(lines), style=cell_style))
            table.add_row(*texts, style=style)
        yield table
        hidden = [column.heading for index, column in enumerate(self.columns) if index not in shown and column.heading]
        if hidden:
            yield Text(f"{', '.join(hidden)}: {self.left_out}", style="dim")

    def _layout(self, max_width: int) -> tuple[list[int], dict[int, int], Split]:
        """Return the indices of the shown columns, their widths, and the function that splits texts."""
        # Split names at joints only if splitting at spaces leaves no room for the columns of rank 0.
        for split in (_WORDS.findall, _JOINTS.findall):
            min_widths = [self._least(index, split) for index in range(len(self.columns))]
            shown_columns = [index for index, column in enumerate(self.columns) if column.rank == 0]
            total_width = sum(min_widths[index] + _GAP for index in shown_columns) - _GAP
            if total_width <= max_width:
                break
        # Add optional columns while they fit.
        for index in sorted(range(len(self.columns)), key=lambda index: self.columns[index].rank):
            if index not in shown_columns and total_width + min_widths[index] + _GAP <= max_width:
                shown_columns.append(index)
                total_width += min_widths[index] + _GAP
        shown_columns.sort()
        widths = {index: min_widths[index] for index in shown_columns}
        full_widths = {index: max(map(cell_len, "\n".join(self._texts(index)).split("\n"))) for index in shown_columns}
        # The columns that need little more get it first, so that the fewest cells are wrapped.
        for index in sorted(shown_columns, key=lambda index: full_widths[index] - widths[index]):
            extra = min(full_widths[index] - widths[index], max(0, max_width - total_width))
            widths[index] += extra
            total_width += extra
        return shown_columns, widths, split

    def _texts(self, index: int) -> list[str]:
        return [self.columns[index].heading, *(_parts(cells[index])[0] for cells, _ in self.rows)]

    def _least(self, index: int, split: Split) -> int:
        """Return the width of the longest part of a column that cannot be split."""
        heading, *cells = self._texts(index)
        unbroken = self.columns[index].right
        parts = "\n".join(cells).split("\n") if unbroken else [part for cell in cells for part in split(cell)]
        return max(cell_len(part.rstrip()) for part in [*split(heading), *parts, " "])


def bar(share: float, cells: int) -> str:
    """Return a bar of ``cells`` characters filled to ``share``, in eighths of a character, padded with spaces."""
    # Full characters, and eighths of one more.
    full, eighths = divmod(round(min(max(share, 0.0), 1.0) * cells * 8), 8)
    return ("█" * full + (_EIGHTHS[eighths] if eighths else "")).ljust(cells)


def _parts(cell: str | tuple[str, str]) -> tuple[str, str]:
    """Return the text and the style of a cell."""
    return (cell, "") if isinstance(cell, str) else cell


def _wrapped(text: str, width: int, split: Split) -> list[str]:
    """Return lines of at most ``width`` characters, broken only where ``split`` divides the text."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for part in split(line):
            # Start a new line before a part that does not fit.
            if current and cell_len((current + part).rstrip()) > width:
                lines.append(current.rstrip())
                current = ""
            current += part
        lines.append(current.rstrip())
    return lines
