"""Writing a view to standard output."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import RenderableType


def show(view: RenderableType) -> None:
    """A text in UTF-8, whatever the terminal's own encoding, since views say so of themselves; else for a terminal."""
    if isinstance(view, str):
        typer.echo(view.removesuffix("\n").encode("utf-8"))
        return
    from rich.console import Console

    Console(file=sys.stdout).print(view)
