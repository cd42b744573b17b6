"""Replay of requests at their recorded times through several models that alternate, stretch by stretch."""

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
"""Maximum number of stretches, and minimum number of requests in each. More stretches give a more certain median."""
_WARM_UP = 8
_OPEN_SECONDS = 600.0


class ServedRequests(NamedTuple):
    """Costs of a stretch of requests: milliseconds from arrival to answer [n], and milliseconds of processor time."""

    latencies_ms: list[float]
    cpu_ms: float


def stretches(at: np.ndarray) -> list[range]:
    """Split requests into stretches whose sizes differ by at most one."""
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
    """Replay requests through all models, and yield each stretch with its costs for every model.

    The models run in processes of their own and serve each stretch one after the other. A coin decides which is first,
    so that of two equal models either may be the faster one, whatever else the machine does.

    Args:
        models: Models by name.
        examples: Encoded requests for each model.
        at: Arrival times in seconds [n].
        speed: Factor by which requests arrive faster than recorded.
        seed: Seed of the coin.
        progress: Shows the stretches.
        parts: Stretches; by default those of `stretches`.

    Raises:
        StageError: A process ends.
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
            costs = {name: _serve(children[name], part, gaps.tolist()) for name in names}
            yield part, {name: costs[name] for name in children}


def _opened(name: str, model: Model, examples: Examples, folder: Path) -> WorkerProcess:
    """Start a process that serves a model, and warm it up."""
    batches = folder / f"{name}.npz"
    write_batches(batches, [examples.batch([index]) for index in range(len(examples))])
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
    """Let a process serve a stretch of requests."""
    cpu_seconds = float(child.memory()["cpu_seconds"])
    latencies = child.serve_requests(list(part), gaps_ms, _OPEN_SECONDS + sum(gaps_ms) / 1000)
    return ServedRequests(latencies, 1000 * (float(child.memory()["cpu_seconds"]) - cpu_seconds))
