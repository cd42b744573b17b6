"""Tables for a terminal of any width, in which no word is broken: what does not fit is left out and named."""

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
_WORDS = re.compile(r"\S+\s*|\s+")
_JOINTS = re.compile(r"[^\s_/,=\[(.-]*[_/,=\[(.-]+\s*|\S+\s*|\s+")
"""Where names may be broken if words alone leave too little room: behind `_`, `/` and their like."""


@dataclass(frozen=True)
class Column:
    """A heading and how its cells are set: flush right, they are figures, which stay in one piece.

    Columns of ``rank`` 0 are always there, others in the order of their ranks while there is room.
    """

    heading: str
    right: bool = False
    rank: int = 0


@dataclass
class FittedTable:
    """Rows of cells below a title. A cell is its text, or the text and a style of its own."""

    title: str
    columns: Sequence[Column]
    left_out: str = "left out for lack of room"
    """What is said of the columns for which there is no room."""
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
        for place in shown:
            column, width = self.columns[place], widths[place]
            heading = Text("\n".join(_wrapped(column.heading, width, split)))
            table.add_column(heading, justify="right" if column.right else "left", width=width, overflow="fold")
        for cells, style in self.rows:
            texts = []
            for place in shown:
                words, own = _parts(cells[place])
                lines = [words] if self.columns[place].right else _wrapped(words, widths[place], split)
                texts.append(Text("\n".join(lines), style=own))
            table.add_row(*texts, style=style)
        yield table
        missing = [column.heading for place, column in enumerate(self.columns) if place not in shown]
        if missing:
            yield Text(f"{', '.join(missing)}: {self.left_out}", style="dim")

    def _layout(self, room: int) -> tuple[list[int], dict[int, int], Split]:
        """The columns that are shown, their widths, and how texts are split."""
        for split in (_WORDS.findall, _JOINTS.findall):
            least = [self._least(place, split) for place in range(len(self.columns))]
            shown = [place for place, column in enumerate(self.columns) if column.rank == 0]
            taken = sum(least[place] + _GAP for place in shown) - _GAP
            if taken <= room:
                break
        for place in sorted(range(len(self.columns)), key=lambda place: self.columns[place].rank):
            if place not in shown and taken + least[place] + _GAP <= room:
                shown.append(place)
                taken += least[place] + _GAP
        shown.sort()
        widths = {place: least[place] for place in shown}
        whole = {place: max(map(cell_len, "\n".join(self._texts(place)).split("\n"))) for place in shown}
        # The columns that need little more get it first, so that the fewest cells are wrapped.
        for place in sorted(shown, key=lambda place: whole[place] - widths[place]):
            more = min(whole[place] - widths[place], max(0, room - taken))
            widths[place] += more
            taken += more
        return shown, widths, split

    def _texts(self, place: int) -> list[str]:
        return [self.columns[place].heading, *(_parts(cells[place])[0] for cells, _ in self.rows)]

    def _least(self, place: int, split: Split) -> int:
        """The width of a column's longest part that is not broken."""
        heading, *cells = self._texts(place)
        whole = self.columns[place].right
        parts = "\n".join(cells).split("\n") if whole else [part for cell in cells for part in split(cell)]
        return max(cell_len(part.rstrip()) for part in [*split(heading), *parts, " "])


def bar(share: float, cells: int) -> str:
    """A bar of so many cells, in eighths of a cell, padded with spaces."""
    full, rest = divmod(round(min(max(share, 0.0), 1.0) * cells * 8), 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(cells)


def _parts(cell: str | tuple[str, str]) -> tuple[str, str]:
    return (cell, "") if isinstance(cell, str) else cell


def _wrapped(text: str, width: int, split: Split) -> list[str]:
    """Lines of at most ``width``, broken between the parts that ``split`` gives."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for part in split(line):
            if current and cell_len((current + part).rstrip()) > width:
                lines.append(current.rstrip())
                current = ""
            current += part
        lines.append(current.rstrip())
    return lines
