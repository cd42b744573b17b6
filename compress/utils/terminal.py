"""Console that shows control characters of foreign names and texts as escapes, such as `\\x1b`.

A terminal would obey them: names of tensors and recipes could move the cursor, set its title or hide text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import rich.console
from rich.segment import Segment

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tabs and line breaks, and characters that change the direction of the text behind them."""


def printable(text: str) -> str:
    """Return the text with control characters as escapes."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class Console(rich.console.Console):
    """Console of rich whose own control sequences, and no others, reach the terminal.

    It does not color numbers and paths in texts: the patterns for that take minutes on some long texts.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, **options)

    def render(
        self, renderable: rich.console.RenderableType, options: rich.console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Yield the segments of a renderable with printable text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)
