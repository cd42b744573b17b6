"""What a session of launches is given, and what it brings in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from compress.benchmark.noise import Usage
from compress.benchmark.reference_timing import ReferenceTimes
from compress.benchmark.rounds import Rounds, WarmUp, are_usual
from compress.formats.target_profile import Target


@dataclass(frozen=True)
class Conditions:
    """How the processes run, and how long.

    ``seconds_left`` is all the time that may be taken from when the launches' host is asked, starts included. Cores and
    the deadline, by the host's clock, are the host's own.
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
    def most_launches(self) -> int:
        """``launches`` is the least; so many are made where the ratios stay uncertain."""
        return 2 * self.launches


@dataclass
class Record:
    """Everything that the launches brought in. The lists of a model have one entry a launch.

    ``timings`` has the rounds of each kind of work, as `launches.Plan` names them. ``start_up`` has what sessions that
    time themselves tell of their start, by names that end in their unit. Of generated texts, ``cached`` tells whether a
    model keeps keys and values of earlier tokens, ``vocabulary`` how many tokens it knows.
    """

    timings: dict[str, Rounds] = field(default_factory=dict)
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
    lost: dict[str, str] = field(default_factory=dict)
    no_energy: str | None = None
    usage: Usage = field(default_factory=Usage)
    launches: int = 0

    def undisturbed(self) -> Record:
        """Without the rounds in which the machine was slowed from outside; see `Rounds.undisturbed`."""
        timings = {name: rounds.undisturbed() for name, rounds in self.timings.items()}
        slowed = any(timings[name] is not rounds for name, rounds in self.timings.items())
        return replace(self, timings=timings, reference=usual_reference(self.reference) if slowed else self.reference)

    def forget(self, model: str) -> None:
        """Drop what was measured of a model that was lost."""
        per_model: list[dict[str, Any]] = [
            *(rounds.turns for rounds in self.timings.values()),
            *(self.server_ms, self.startup_ms, self.session_load_ms, self.runtime_bytes, self.single_bytes),
            *(self.batched_bytes, self.warm_ups, self.settings, self.start_up, self.cached, self.vocabulary),
        ]
        for kept in per_model:
            kept.pop(model, None)


def usual_reference(times: list[ReferenceTimes]) -> list[ReferenceTimes]:
    """Those of a machine that nothing slows, since times of other sessions are divided by them."""
    usual = are_usual(np.array([one.matmul_ms for one in times]))
    return [one for one, keeps in zip(times, usual, strict=True) if keeps]
