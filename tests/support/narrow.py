"""What a terminal of some width shows, and whether a word was broken in it."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def shown(what: RenderableType, width: int = 120) -> str:
    """The text, as a terminal of that width has it."""
    stream = io.StringIO()
    Console(file=stream, width=width).print(what)
    return stream.getvalue()
