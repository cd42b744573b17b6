"""Runtimes, by name, as the formats have them; `get_runtime` loads one file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from compress.formats.registry import FORMATS, RUNTIMES
from compress.formats.spec import load
from compress.formats.target_profile import Target
from compress.utils.errors import SampleError, StorageError
from compress.utils.progress import Progress

if TYPE_CHECKING:
    from compress.models.model import Model
    from compress.formats.runtime import Runtime, Session


def get_runtime(name: str) -> Runtime:
    """The runtime of that name. Raises `KeyError` for a name outside `RUNTIMES`."""
    runtime: Runtime = load(RUNTIMES[name].runtime)
    return runtime


def why_unavailable(target: Target) -> str | None:
    """Why nothing can run on ``target`` here, or ``None`` where it can."""
    if target.runtime not in RUNTIMES:
        return f"its runtime, {target.runtime}, is not one that compress runs"
    try:
        runtime = get_runtime(target.runtime)
    except ImportError as error:
        return f"the runtime {target.runtime!r} cannot be imported: {error}"
    return runtime.unavailable(target)


def opened(model: Model) -> Session:
    """A model of a format, as the first of that format's targets opens it, with one thread."""
    target = FORMATS[model.kind].targets[0].target
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        return get_runtime(target.runtime).open(Path(folder), target, threads=1)


def make_ready(target: Target, progress: Progress) -> str | None:
    """Fetch what the runtime of ``target`` is missing; why nothing can run there nevertheless, or ``None``."""
    reason = why_unavailable(target)
    if reason is not None:
        return reason
    from compress.formats.runtime import Fetches

    runtime = get_runtime(target.runtime)
    try:
        if isinstance(runtime, Fetches):
            runtime.fetch(target, progress)
    except (SampleError, StorageError) as error:
        return error.what
    return None
