"""Replaying requests at their recorded times through models that take turns, stretch by stretch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from compress.benchmark.subprocess_client import WorkerProcess
from compress.benchmark.worker import write_batches
from compress.plugins.monitoring.outputs import Model
from compress.tasks.task import Examples
from compress.utils.environment import spread_cores
from compress.utils.progress import Progress

_STRETCHES, _FEWEST = 40, 5
"""So many stretches at most, of so many requests at least: the more there are, the surer a median of their ratios."""
_WARM_UP = 8
_OPEN_SECONDS = 600.0


class ServedRequests(NamedTuple):
    """What a stretch of requests took a model: milliseconds from arrival to answer [n], and of the processor."""

    latencies_ms: list[float]
    cpu_ms: float


def stretches(at: np.ndarray) -> list[range]:
    """Requests by number, in stretches of as many each, or one more."""
    count = max(1, min(_STRETCHES, len(at) // _FEWEST))
    edges = np.linspace(0, len(at), count + 1).astype(int)
    return [range(start, stop) for start, stop in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]


def replay(
    models: Mapping[str, Model],
    examples: Mapping[str, Examples],
    at: np.ndarray,
    speed: float,
    seed: int,
    progress: Progress,
    parts: Sequence[range] = (),
) -> Iterator[tuple[range, dict[str, ServedRequests]]]:
    """Each stretch of the requests that came ``at`` seconds, with what it took each model; `stretches`, or ``parts``.

    Models are alive together, in processes of their own, and serve each stretch one after the other. A coin says which
    is first, so that of two equal ones either is as likely to be the faster, whatever else the machine does. Raises
    what opening a model raises, and `StageError` where a process ends.
    """
    chance = np.random.default_rng(seed)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="compress-ab-")))
        children = {
            name: stack.enter_context(_opened(name, model, examples[name], folder)) for name, model in models.items()
        }
        parts = parts or stretches(at)
        for part in progress.track(parts, "Replay", len(parts)):
            gaps = np.diff(at[part.start : part.stop], prepend=at[part.start]) * 1000 / speed
            names = list(children) if chance.random() < 0.5 else list(children)[::-1]
            found = {name: _serve(children[name], part, gaps.tolist()) for name in names}
            yield part, {name: found[name] for name in children}


def _opened(name: str, model: Model, examples: Examples, folder: Path) -> WorkerProcess:
    batches = folder / f"{name}.npz"
    write_batches(batches, [examples.batch([place]) for place in range(len(examples))])
    child = WorkerProcess(name)
    try:
        child.open(model.folder, model.target, model.threads, spread_cores(model.threads), batches, _OPEN_SECONDS)
        child.load(batches, _OPEN_SECONDS)
        child.round(list(range(min(_WARM_UP, len(examples)))), _OPEN_SECONDS)
    except BaseException:
        child.kill()
        raise
    return child


def _serve(child: WorkerProcess, part: range, gaps_ms: list[float]) -> ServedRequests:
    before = float(child.memory()["cpu_seconds"])
    latencies = child.serve_requests(list(part), gaps_ms, _OPEN_SECONDS + sum(gaps_ms) / 1000)
    return ServedRequests(latencies, 1000 * (float(child.memory()["cpu_seconds"]) - before))
