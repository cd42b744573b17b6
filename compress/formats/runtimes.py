"""Lookup of runtimes by name; `get_runtime` imports only the module of one runtime."""

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
    from compress.formats.runtime import Runtime, Session
    from compress.models.model import Model


def get_runtime(name: str) -> Runtime:
    """Return the runtime of that name; raise `KeyError` for a name outside `RUNTIMES`."""
    runtime: Runtime = load(RUNTIMES[name].runtime)
    return runtime


def why_unavailable(target: Target) -> str | None:
    """Return the reason why nothing can run on ``target`` on this machine, or ``None`` if it is available."""
    if target.runtime not in RUNTIMES:
        return f"its runtime, {target.runtime}, is not one that compress runs"
    try:
        runtime = get_runtime(target.runtime)
    except ImportError as error:
        return f"the runtime {target.runtime!r} cannot be imported: {error}"
    return runtime.unavailable(target)


def opened(model: Model) -> Session:
    """Open a model with the first target of its format and one thread."""
    target = FORMATS[model.kind].targets[0].target
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder))
        return get_runtime(target.runtime).open(Path(folder), target, threads=1)


def make_ready(target: Target, progress: Progress) -> str | None:
    """Fetch missing files of the runtime of ``target``; return the reason if it is still unavailable, else ``None``."""
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
