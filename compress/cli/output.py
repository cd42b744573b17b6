"""What commands say: views on standard output, and what `compress doctor` found."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

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


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. ``advice`` says how to mend what isn't ``ok``."""

    level: Literal["ok", "warning", "problem"]
    what: str
    advice: str | None = None
