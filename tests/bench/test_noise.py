from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compress.bench.noise import Snapshot, judge, spread

CORES = 2
BEFORE = Snapshot(clock=100.0, busy_seconds=50.0, stolen_seconds=1.0, throttled_seconds=0.0, own_seconds=5.0, load=0.3)
AFTER = replace(BEFORE, clock=110.0, busy_seconds=60.1, own_seconds=15.0)
STILL = {"baseline": np.linspace(1.0, 1.02, 20), "final": np.linspace(0.1, 0.101, 20)}


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: CORES)
    monkeypatch.setattr("compress.bench.noise.granted_cores", lambda: tuple(range(CORES)))


def test_a_quiet_machine_is_quiet() -> None:
    noise = judge(BEFORE, AFTER, STILL)
    assert noise.verdict == "quiet"
    assert noise.reasons == ()
    assert noise.figures["others_share"] == pytest.approx(0.1 / 20)
    assert str(noise) == "noise: quiet (rounds vary by 1.0% at most)"


@pytest.mark.parametrize(
    ("before", "after", "verdict", "reason"),
    [
        ({}, {"busy_seconds": 63.0}, "noisy", "other processes took 15% of the processor"),
        ({}, {"busy_seconds": 71.0}, "unusable", "other processes took 55% of the processor"),
        ({}, {"stolen_seconds": 4.0}, "noisy", "the hypervisor took 15% of the processor"),
        ({}, {"throttled_seconds": 0.2}, "noisy", "the control group was throttled 2.0% of the time"),
        ({}, {"throttled_seconds": 2.0}, "unusable", "the control group was throttled 20.0% of the time"),
        ({"load": 3.2}, {}, "noisy", "the load was 3.2 on 2 cores before the start"),
    ],
)
def test_a_disturbance_is_named(before: dict[str, float], after: dict[str, float], verdict: str, reason: str) -> None:
    noise = judge(replace(BEFORE, **before), replace(AFTER, **after), STILL)
    assert (noise.verdict, noise.reasons) == (verdict, (reason,))


@pytest.mark.parametrize(("width", "verdict"), [(0.1, "quiet"), (0.3, "noisy"), (0.8, "unusable")])
def test_the_most_restless_model_decides(width: float, verdict: str) -> None:
    # The quartiles of an even spread are half its width apart.
    restless = {**STILL, "prune": np.linspace(1 - width / 2, 1 + width / 2, 21)}
    noise = judge(BEFORE, AFTER, restless)
    assert noise.verdict == verdict
    assert noise.figures["round_spread"] == pytest.approx(width / 2)
    if verdict != "quiet":
        assert noise.reasons == (f"the rounds of 'prune' vary by {width / 2:.0%}",)


def test_spread_is_the_interquartile_range_over_the_median() -> None:
    assert spread(np.array([1.0, 2.0, 3.0, 4.0, 5.0])) == pytest.approx(2 / 3)


def test_real_snapshots_move_forward() -> None:
    first = Snapshot.take(children_seconds=0.0)
    total = 0
    for i in range(2_000_000):
        total += i
    second = Snapshot.take(children_seconds=0.0)
    assert second.clock > first.clock
    assert second.own_seconds - first.own_seconds == pytest.approx(second.clock - first.clock, rel=0.9)
    assert second.busy_seconds >= first.busy_seconds
