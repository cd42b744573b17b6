"""Whether the machine was quiet while it measured, and if not, why not."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import psutil

from compress.environment import granted_cores, throttling

Verdict = Literal["quiet", "noisy", "unusable"]

_NOISY_SPREAD, _UNUSABLE_SPREAD = 0.10, 0.30
"""Interquartile range over median of the round medians; torch.utils.benchmark warns at 10% too."""
_NOISY_OTHERS, _UNUSABLE_OTHERS = 0.10, 0.50
"""Share of the machine's processor time taken by others, or by the hypervisor."""
_UNUSABLE_THROTTLED = 0.10
_NOISY_LOAD = 1.5


@dataclass(frozen=True)
class Noise:
    """A verdict with the reasons for it, and the figures behind them."""

    verdict: Verdict
    reasons: tuple[str, ...]
    figures: dict[str, float | None]

    def __str__(self) -> str:
        spread = self.figures["round_spread"]
        return f"noise: {self.verdict} ({'; '.join(self.reasons) or f'rounds vary by {spread:.1%} at most'})"


@dataclass(frozen=True)
class Snapshot:
    """Counters of the machine at one moment. ``own_seconds`` is this benchmark's own processor time."""

    clock: float
    busy_seconds: float
    stolen_seconds: float
    throttled_seconds: float
    own_seconds: float
    load: float | None

    @classmethod
    def take(cls, children_seconds: float) -> Snapshot:
        """Read the counters now; ``children_seconds`` is the processor time of the measured processes."""
        times = psutil.cpu_times()
        stolen = float(getattr(times, "steal", 0.0))
        idle = float(times.idle) + float(getattr(times, "iowait", 0.0))
        # Guests' time is already part of user time.
        total = sum(times) - float(getattr(times, "guest", 0.0)) - float(getattr(times, "guest_nice", 0.0))
        return cls(
            clock=time.perf_counter(),
            busy_seconds=float(total) - idle - stolen,
            stolen_seconds=stolen,
            throttled_seconds=throttling().seconds,
            own_seconds=time.process_time() + children_seconds,
            load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        )


def spread(medians: np.ndarray) -> float:
    """Interquartile range over median."""
    low, middle, high = np.quantile(medians, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


def judge(before: Snapshot, after: Snapshot, round_medians: Mapping[str, np.ndarray]) -> Noise:
    """The verdict on what was measured between two snapshots."""
    elapsed = after.clock - before.clock
    capacity = elapsed * (os.cpu_count() or 1)
    own = after.own_seconds - before.own_seconds
    others = max(0.0, after.busy_seconds - before.busy_seconds - own) / capacity
    stolen = (after.stolen_seconds - before.stolen_seconds) / capacity
    throttled = (after.throttled_seconds - before.throttled_seconds) / elapsed
    spreads = {model: spread(medians) for model, medians in round_medians.items()}
    worst = max(spreads, key=spreads.__getitem__)
    findings = [
        _finding(spreads[worst], _NOISY_SPREAD, _UNUSABLE_SPREAD, f"the rounds of {worst!r} vary by {{:.0%}}"),
        _finding(others, _NOISY_OTHERS, _UNUSABLE_OTHERS, "other processes took {:.0%} of the processor"),
        _finding(stolen, _NOISY_OTHERS, _UNUSABLE_OTHERS, "the hypervisor took {:.0%} of the processor"),
        _finding(throttled, 0.0, _UNUSABLE_THROTTLED, "the control group was throttled {:.1%} of the time"),
    ]
    if before.load is not None and before.load > _NOISY_LOAD * len(granted_cores()):
        load = f"the load was {before.load:.1f} on {len(granted_cores())} cores before the start"
        findings.append(("noisy", load))
    verdicts = {verdict for verdict, _ in findings}
    verdict: Verdict = "unusable" if "unusable" in verdicts else "noisy" if "noisy" in verdicts else "quiet"
    return Noise(
        verdict,
        tuple(reason for found, reason in findings if found != "quiet"),
        {
            "round_spread": spreads[worst],
            "others_share": others,
            "stolen_share": stolen,
            "throttled_share": throttled,
            "load_before": before.load,
        },
    )


def _finding(value: float, noisy: float, unusable: float, text: str) -> tuple[Verdict, str]:
    verdict: Verdict = "unusable" if value > unusable else "noisy" if value > noisy else "quiet"
    return verdict, text.format(value)
