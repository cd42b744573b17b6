"""Conditions and record of a timing session: its input parameters and everything that it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import Any

import numpy as np

from compress.benchmark.noise import Usage
from compress.benchmark.reference_timing import ReferenceTimes
from compress.benchmark.rounds import TimedRounds, WarmUp, is_undisturbed
from compress.formats.target_profile import Target

PEAK_MEMORY, BATCHED_MEMORY = "peak_memory_bytes", "peak_memory_bytes_batch"
"""Figures of a record: peak memory of single calls, and in batches."""


@dataclass(frozen=True)
class TimingConditions:
    """Conditions of a timing session: how the processes run, and for how long.

    ``launches`` is the smallest number of launches. ``seconds_left`` is the whole time from the request to the host,
    process starts included. ``cores`` and ``deadline`` (by the host's clock) are set by the host itself.
    """

    target: Target
    baseline: str
    threads: int
    launches: int
    seconds: float
    precision: float
    confidence: float
    seed: int
    timeout_seconds: float
    batched: bool = False
    rate: float | None = None
    seconds_left: float | None = None
    cores: Sequence[int] = ()
    deadline: float | None = None

    @property
    def max_launches(self) -> int:
        """Return the number of launches that are made if the ratios remain uncertain."""
        return 2 * self.launches


@dataclass
class TimingRecord:
    """Everything that the launches of a session measured. The lists of a model have one entry for each launch.

    ``timings`` has the rounds of each kind of work, as `WorkloadPlan.timings` names them. ``figures`` has the memory
    and the start-up times of each model by metrics that end in their unit. For text generation, ``cached`` states
    whether a model keeps keys and values of earlier tokens, and ``vocabulary`` is its vocabulary size.
    """

    timings: dict[str, TimedRounds] = field(default_factory=dict)
    cached: dict[str, bool] = field(default_factory=dict)
    vocabulary: dict[str, int] = field(default_factory=dict)
    server_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    warm_ups: dict[str, list[WarmUp]] = field(default_factory=dict)
    reference: list[ReferenceTimes] = field(default_factory=list)
    frequencies_mhz: list[float] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    lost_models: dict[str, str] = field(default_factory=dict)
    energy_unavailable: str | None = None
    usage: Usage = field(default_factory=Usage)
    launches: int = 0

    def undisturbed(self) -> TimingRecord:
        """Return the record without rounds in which other work slowed the machine; see `TimedRounds.undisturbed`."""
        timings, reference = {name: rounds.undisturbed() for name, rounds in self.timings.items()}, self.reference
        # Times of other sessions are divided by the reference times, which are those of the undisturbed machine, too.
        if any(timings[name] is not rounds for name, rounds in self.timings.items()):
            reference = list(compress(reference, is_undisturbed(np.array([times.matmul_ms for times in reference]))))
        return replace(self, timings=timings, reference=reference)

    def add_figures(self, model: str, figures: Mapping[str, float]) -> None:
        """Append figures of one launch of a model."""
        for metric, value in figures.items():
            self.figures.setdefault(model, {}).setdefault(metric, []).append(value)

    def drop_model(self, model: str) -> None:
        """Remove the measurements of a model whose process failed."""
        per_model: list[dict[str, Any]] = [
            *(rounds.times for rounds in self.timings.values()),
            *(self.server_ms, self.figures, self.warm_ups, self.settings, self.cached, self.vocabulary),
        ]
        for entries in per_model:
            entries.pop(model, None)
