"""What a session of launches is given, and what it brings in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from compress.bench.noise import Usage
from compress.bench.reference import ReferenceTimes
from compress.bench.rounds import Rounds, WarmUp, are_usual
from compress.targets import Target


@dataclass(frozen=True)
class Workload:
    """What every process is given. Positions in ``singles`` and ``batches`` count in the file of all batches.

    ``first`` and ``all`` name, for each model, the file with one example and the file with everything. ``shapes`` are
    singles and batches of each length that occurs.
    """

    artifacts: Mapping[str, Path]
    first: Mapping[str, Path]
    all: Mapping[str, Path]
    singles: Sequence[int]
    batches: Sequence[int]
    single_shapes: Sequence[int]


@dataclass(frozen=True)
class Conditions:
    """How the processes run, and how long."""

    target: Target
    threads: int
    launches: int
    cores: Sequence[int]
    seconds: float
    deadline: float | None
    batched: bool
    rate: float | None
    precision: float
    confidence: float
    seed: int
    timeout_seconds: float

    @property
    def most_launches(self) -> int:
        """``launches`` is the least; so many are made where the ratios stay uncertain."""
        return 2 * self.launches


@dataclass
class Record:
    """Everything that the launches brought in. The lists of a model have one entry a launch.

    ``start_up`` has what sessions that time themselves tell of their start, by names that end in their unit.
    """

    single: Rounds = field(default_factory=Rounds)
    batched: Rounds = field(default_factory=Rounds)
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

    def rounds(self) -> dict[str, Rounds]:
        """Of each kind of work."""
        return {"single": self.single, "batched": self.batched}

    def undisturbed(self) -> Record:
        """Without the rounds in which the machine was slowed from outside; see `Rounds.undisturbed`."""
        single = self.single.undisturbed()
        reference = self.reference if single is self.single else usual_reference(self.reference)
        return replace(self, single=single, batched=self.batched.undisturbed(), reference=reference)

    def forget(self, model: str) -> None:
        """Drop what was measured of a model that was lost."""
        per_model: list[dict[str, Any]] = [
            *(self.single.turns, self.batched.turns, self.server_ms, self.startup_ms, self.session_load_ms),
            *(self.runtime_bytes, self.single_bytes, self.batched_bytes, self.warm_ups, self.settings, self.start_up),
        ]
        for kept in per_model:
            kept.pop(model, None)


def usual_reference(times: list[ReferenceTimes]) -> list[ReferenceTimes]:
    """Those of a machine that nothing slows, since times of other sessions are divided by them."""
    usual = are_usual(np.array([one.matmul_ms for one in times]))
    return [one for one, keeps in zip(times, usual, strict=True) if keeps]
