"""Sessions in the worker process whose model runs in another process, and interruptions of this process."""

from __future__ import annotations

import resource
from collections.abc import Sequence

from compress.formats.runtime import ComponentSession, TimesItself

_MODEL, _TRANSFER = "model_", "transfer_bytes"


def external_sessions(session: object) -> list[TimesItself]:
    """Return the sessions of a model whose graphs run in other processes. A model in this process has none."""
    sessions = session.parts.values() if isinstance(session, ComponentSession) else [session]
    return [part for part in sessions if isinstance(part, TimesItself)]


def combined_start_up(sessions: Sequence[TimesItself]) -> dict[str, float]:
    """Return the start-up times of components as if one process held them all: the runtime once, and each model."""
    first, *others = (session.start_up for session in sessions)
    combined = dict(first)
    for times in others:
        for name in combined:
            combined[name] += times[name] if name.startswith(_MODEL) else 0.0
        if _TRANSFER in combined:
            combined[_TRANSFER] += times[_MODEL + _TRANSFER]
    return combined


def preemptions() -> int:
    """Return how often a thread of this process had to stop for another process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
