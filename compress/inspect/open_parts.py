"""Whatever format an artifact is in, its file taken apart as the target's runtime runs it."""

from __future__ import annotations

from pathlib import Path

from compress.formats.model_file import format_of, model_file
from compress.formats.parts import Parts
from compress.formats.registry import RUNTIMES, part_of
from compress.targets import Target


def gives_values(target: Target) -> bool:
    """Whether `open_parts` takes files apart there."""
    runtime = RUNTIMES[target.runtime]
    return runtime.gives_values and runtime.provider == target.provider


def open_parts(artifact: Path, target: Target, length: int | None = None) -> Parts:
    """The one file of ``artifact``, whose parts run on ``target``. Raises `ModelError` for one that can't be opened.

    ``length`` tokens are the most that it will be given, which some formats have to know.
    """
    parts: Parts = part_of(format_of(artifact), "parts")(model_file(artifact), target, length)
    return parts
