from __future__ import annotations

from dataclasses import replace

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


def test_a_quiet_machine_is_quiet() -> None:
    noise = judge_noise(USAGE, STILL, 0.3)
    assert noise.verdict == "quiet"
    assert noise.reasons == ()
    assert noise.figures["others_share"] == pytest.approx(0.1 / 20)
    assert str(noise) == "noise: quiet (rounds vary by 1.0% at most)"


@pytest.mark.parametrize(
    ("change", "verdict", "reason"),
    [
        ({"busy_seconds": 13.0}, "noisy", "other processes took 15% of the processor"),
        ({"busy_seconds": 21.0}, "unusable", "other processes took 55% of the processor"),
        ({"stolen_seconds": 3.0}, "noisy", "the hypervisor took 15% of the processor"),
        ({"throttled_seconds": 0.2}, "noisy", "the control group was throttled 2.0% of the time"),
        ({"throttled_seconds": 2.0}, "unusable", "the control group was throttled 20.0% of the time"),
    ],
)
def test_a_disturbance_is_named(change: dict[str, float], verdict: str, reason: str) -> None:
    noise = judge_noise(replace(USAGE, **change), STILL, 0.3)
    assert (noise.verdict, noise.reasons) == (verdict, (reason,))


def test_a_load_before_the_start_is_named() -> None:
    noise = judge_noise(USAGE, STILL, 3.2)
    assert (noise.verdict, noise.reasons) == ("noisy", ("the load was 3.2 on 2 cores before the start",))


def test_the_reference_product_tells_of_the_machine_alone() -> None:
    noise = judge_noise(USAGE, STILL, reference_ms=np.linspace(0.8, 1.2, 21))
    assert (noise.verdict, noise.reasons) == ("noisy", ("the reference product varies by 20%",))


def test_a_falling_frequency_is_named() -> None:
    noise = judge_noise(USAGE, STILL, frequencies_mhz=[3000.0, 2400.0, 1800.0])
    assert (noise.verdict, noise.reasons) == ("unusable", ("the processor's frequency fell by 40%",))


@pytest.mark.parametrize(("width", "verdict"), [(0.1, "quiet"), (0.3, "noisy"), (0.8, "unusable")])
def test_the_most_restless_model_decides(width: float, verdict: str) -> None:
    # The quartiles of an even spread are half its width apart.
    restless = {**STILL, "prune": np.linspace(1 - width / 2, 1 + width / 2, 21)}
    noise = judge_noise(USAGE, restless)
    assert noise.verdict == verdict
    assert noise.figures["round_spread"] == pytest.approx(width / 2)
    if verdict != "quiet":
        assert noise.reasons == (f"the rounds of 'prune' vary by {width / 2:.0%}",)


def test_real_snapshots_move_forward() -> None:
    first = Usage.now(children_seconds=0.0)
    total = 0
    for i in range(2_000_000):
        total += i
    usage = Usage.now(children_seconds=0.0) - first
    assert usage.elapsed > 0
    assert usage.own_seconds == pytest.approx(usage.elapsed, rel=0.9)
    assert usage.busy_seconds >= 0
