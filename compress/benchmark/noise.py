"""Verdict on how quiet the machine was during a measurement, with reasons."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
import psutil

from compress.utils.environment import granted_cores, throttling

Verdict = Literal["quiet", "noisy", "unusable"]

_NOISY_SPREAD, _UNUSABLE_SPREAD = 0.10, 0.30
"""Interquartile range over median of the rounds. torch.utils.benchmark also warns at 10%."""
_NOISY_OTHERS, _UNUSABLE_OTHERS = 0.10, 0.50
"""Share of the machine's processor time that other processes or the hypervisor took."""
_UNUSABLE_THROTTLED = 0.10
_NOISY_LOAD = 1.5


@dataclass(frozen=True)
class Noise:
    """Verdict on the noise of a measurement, its reasons, and the numbers behind them."""

    verdict: Verdict
    reasons: tuple[str, ...]
    figures: dict[str, float | None]

    def __str__(self) -> str:
        spread = self.figures["round_spread"]
        return f"noise: {self.verdict} ({'; '.join(self.reasons) or f'rounds vary by {spread:.1%} at most'})"


@dataclass(frozen=True)
class Usage:
    """Counters of the machine at one moment, or their difference between two moments.

    ``own_seconds`` is the processor time of this benchmark.
    """

    elapsed: float = 0.0
    busy_seconds: float = 0.0
    stolen_seconds: float = 0.0
    throttled_seconds: float = 0.0
    own_seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*(first + second for first, second in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(*(last - first for last, first in zip(astuple(self), astuple(earlier), strict=True)))

    @classmethod
    def now(cls, children_seconds: float) -> Usage:
        """Read the counters; ``children_seconds`` is the processor time of the measured processes."""
        times = psutil.cpu_times()
        # Time that the hypervisor gave to other virtual machines.
        stolen = float(getattr(times, "steal", 0.0))
        idle = float(times.idle) + float(getattr(times, "iowait", 0.0))
        # Guests' time is already part of user time.
        total = sum(times) - float(getattr(times, "guest", 0.0)) - float(getattr(times, "guest_nice", 0.0))
        return cls(
            elapsed=time.perf_counter(),
            busy_seconds=float(total) - idle - stolen,
            stolen_seconds=stolen,
            throttled_seconds=throttling().seconds,
            own_seconds=time.process_time() + children_seconds,
        )


def load_average() -> float | None:
    """Return the mean number of running and waiting processes of the last minute, or None if unknown."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def frequency_mhz() -> float | None:
    """Return the processor's current frequency, or None if the system doesn't report it."""
    try:
        now = psutil.cpu_freq()
    except (OSError, NotImplementedError):
        return None
    return float(now.current) if now and now.current else None


def spread(medians: np.ndarray) -> float:
    """Return the interquartile range over the median."""
    low, middle, high = np.quantile(medians, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


def judge_noise(
    usage: Usage,
    relative_rounds: Mapping[str, np.ndarray],
    load_before: float | None = None,
    reference_ms: np.ndarray | None = None,
    frequencies_mhz: Sequence[float] = (),
    cores: int | None = None,
    granted: int | None = None,
) -> Noise:
    """Return the verdict on the noise during a measurement.

    Args:
        usage: Difference of the machine's counters during the measurement.
        relative_rounds: Time of each round of a model relative to all its rounds, [rounds].
        load_before: Load average before the start.
        reference_ms: Times of the reference product around the rounds in ms, [rounds]. Only noise varies them.
        frequencies_mhz: Processor frequency after each launch.
        cores: Cores of the machine. Default: this machine's.
        granted: Cores that the measuring process may use. Default: this process's.
    """
    capacity = usage.elapsed * (cores or os.cpu_count() or 1)
    granted = granted or len(granted_cores())
    # The share of the whole machine, since other processes may use any core.
    others = max(0.0, usage.busy_seconds - usage.own_seconds) / capacity
    stolen = usage.stolen_seconds / capacity
    throttled = usage.throttled_seconds / usage.elapsed
    spreads = {model: spread(rounds) for model, rounds in relative_rounds.items()}
    worst = max(spreads, key=spreads.__getitem__)
    reference = usual_ms = None
    if reference_ms is not None and len(reference_ms):
        reference, usual_ms = spread(reference_ms), float(np.median(reference_ms))
    # A falling frequency means heat or a power limit.
    slowed = 1 - min(frequencies_mhz) / max(frequencies_mhz) if len(frequencies_mhz) else None
    findings = [
        _finding(spreads[worst], _NOISY_SPREAD, _UNUSABLE_SPREAD, f"the rounds of {worst!r} vary by {{:.0%}}"),
        _finding(reference or 0.0, _NOISY_SPREAD, _UNUSABLE_SPREAD, "the reference product varies by {:.0%}"),
        _finding(slowed or 0.0, _NOISY_SPREAD, _UNUSABLE_SPREAD, "the processor's frequency fell by {:.0%}"),
        _finding(others, _NOISY_OTHERS, _UNUSABLE_OTHERS, "other processes took {:.0%} of the processor"),
        _finding(stolen, _NOISY_OTHERS, _UNUSABLE_OTHERS, "the hypervisor took {:.0%} of the processor"),
        _finding(throttled, 0.0, _UNUSABLE_THROTTLED, "the cgroup was throttled {:.1%} of the time"),
    ]
    if load_before is not None and load_before > _NOISY_LOAD * granted:
        load = f"the load was {load_before:.1f} on {granted} cores before the start"
        findings.append(("noisy", load))
    # The worst finding decides.
    verdicts = {verdict for verdict, _ in findings}
    verdict: Verdict = "unusable" if "unusable" in verdicts else "noisy" if "noisy" in verdicts else "quiet"
    return Noise(
        verdict,
        tuple(reason for level, reason in findings if level != "quiet"),
        {
            "round_spread": spreads[worst],
            "reference_spread": reference,
            "reference_ms": usual_ms,
            "frequency_drop": slowed,
            "others_share": others,
            "stolen_share": stolen,
            "throttled_share": throttled,
            "load_before": load_before,
        },
    )


def _finding(value: float, noisy: float, unusable: float, text: str) -> tuple[Verdict, str]:
    verdict: Verdict = "unusable" if value > unusable else "noisy" if value > noisy else "quiet"
    return verdict, text.format(value)
