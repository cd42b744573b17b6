"""Tests of noise verdicts from resource usage and the spread of rounds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from compress.benchmark.noise import Usage, judge_noise

CORES = 2
USAGE = Usage(elapsed=10.0, busy_seconds=10.1, stolen_seconds=0.0, throttled_seconds=0.0, own_seconds=10.0)
STILL = {"baseline": np.linspace(0.99, 1.01, 20), "final": np.linspace(0.995, 1.005, 20)}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: CORES)
    monkeypatch.setattr("compress.benchmark.noise.granted_cores", lambda: tuple(range(CORES)))


def test_undisturbed_machine_is_quiet() -> None:
    noise = judge_noise(USAGE, STILL, 0.3)
    assert noise.verdict == "quiet"
    assert noise.reasons == ()
    assert noise.figures["others_share"] == pytest.approx(0.1 / 20)
    assert str(noise) == "noise: quiet (rounds vary by 1.0% at most)"


@pytest.mark.parametrize(
    ("usage", "figures", "verdict", "reason"),
    [
        ({"busy_seconds": 13.0}, {}, "noisy", "other processes took 15% of the processor"),
        ({"busy_seconds": 21.0}, {}, "unusable", "other processes took 55% of the processor"),
        ({"stolen_seconds": 3.0}, {}, "noisy", "the hypervisor took 15% of the processor"),
        ({"throttled_seconds": 0.2}, {}, "noisy", "the cgroup was throttled 2.0% of the time"),
        ({"throttled_seconds": 2.0}, {}, "unusable", "the cgroup was throttled 20.0% of the time"),
        ({}, {"load_before": 3.2}, "noisy", "the load was 3.2 on 2 cores before the start"),
        ({}, {"reference_ms": np.linspace(0.8, 1.2, 21)}, "noisy", "the reference product varies by 20%"),
        ({}, {"frequencies_mhz": [3000.0, 2400.0, 1800.0]}, "unusable", "the processor's frequency fell by 40%"),
    ],
)
def test_disturbance_is_reported(usage: dict[str, float], figures: dict[str, Any], verdict: str, reason: str) -> None:
    noise = judge_noise(replace(USAGE, **usage), STILL, **figures)
    assert (noise.verdict, noise.reasons) == (verdict, (reason,))


@pytest.mark.parametrize(("width", "verdict"), [(0.1, "quiet"), (0.3, "noisy"), (0.8, "unusable")])
def test_model_with_largest_spread_decides(width: float, verdict: str) -> None:
    # The interquartile range of a uniform distribution is half its width.
    noise = judge_noise(USAGE, {**STILL, "prune": np.linspace(1 - width / 2, 1 + width / 2, 21)})
    assert noise.verdict == verdict
    assert noise.figures["round_spread"] == pytest.approx(width / 2)
    if verdict != "quiet":
        assert noise.reasons == (f"the rounds of 'prune' vary by {width / 2:.0%}",)


def test_real_usage_increases() -> None:
    first = Usage.now(children_seconds=0.0)
    sum(range(20_000_000))
    usage = Usage.now(children_seconds=0.0) - first
    assert usage.elapsed > 0
    assert usage.own_seconds == pytest.approx(usage.elapsed, rel=0.9)
    assert usage.busy_seconds >= 0
