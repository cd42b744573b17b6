"""Conditions and record of a timing session: its input parameters and everything that it measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from compress.benchmark.noise import Usage
from compress.benchmark.reference_timing import ReferenceTimes
from compress.benchmark.rounds import TimedRounds, WarmUp, is_undisturbed
from compress.formats.target_profile import Target


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

    ``timings`` has the rounds of each kind of work, as `WorkloadPlan.timings` names them. ``start_up`` has the start-up
    times that sessions in another process report, by names that end in their unit. For text generation, ``cached``
    states whether a model keeps keys and values of earlier tokens, and ``vocabulary`` is its vocabulary size.
    """

    timings: dict[str, TimedRounds] = field(default_factory=dict)
    cached: dict[str, bool] = field(default_factory=dict)
    vocabulary: dict[str, int] = field(default_factory=dict)
    server_ms: dict[str, list[list[float]]] = field(default_factory=dict)
    startup_ms: dict[str, list[float]] = field(default_factory=dict)
    session_load_ms: dict[str, list[float]] = field(default_factory=dict)
    runtime_bytes: dict[str, list[float]] = field(default_factory=dict)
    start_up: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    single_bytes: dict[str, list[float]] = field(default_factory=dict)
    batched_bytes: dict[str, list[float]] = field(default_factory=dict)
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
        timings = {name: rounds.undisturbed() for name, rounds in self.timings.items()}
        slowed = any(timings[name] is not rounds for name, rounds in self.timings.items())
        return replace(
            self, timings=timings, reference=undisturbed_reference(self.reference) if slowed else self.reference
        )

    def drop_model(self, model: str) -> None:
        """Remove the measurements of a model whose process failed."""
        per_model: list[dict[str, Any]] = [
            *(rounds.times for rounds in self.timings.values()),
            *(self.server_ms, self.startup_ms, self.session_load_ms, self.runtime_bytes, self.single_bytes),
            *(self.batched_bytes, self.warm_ups, self.settings, self.start_up, self.cached, self.vocabulary),
        ]
        for entries in per_model:
            entries.pop(model, None)


def undisturbed_reference(times: list[ReferenceTimes]) -> list[ReferenceTimes]:
    """Return the reference times of the undisturbed machine, because times of other sessions are divided by them."""
    undisturbed = is_undisturbed(np.array([kernel_times.matmul_ms for kernel_times in times]))
    return [kernel_times for kernel_times, is_usable in zip(times, undisturbed, strict=True) if is_usable]
