"""Text of a rich renderable on a terminal of a given width."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType


def shown(what: RenderableType, width: int = 120) -> str:
    """Render ``what`` as a terminal of ``width`` columns shows it."""
    stream = io.StringIO()
    Console(file=stream, width=width).print(what)
    return stream.getvalue()
