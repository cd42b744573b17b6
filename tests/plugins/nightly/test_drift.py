"""Drift against the history: steps, ramps, what was accepted, what the machine did, and who did it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from nights import FIRST, HOST, SUITE, fill, ignore, night, outcome, row

from compress.plugins.nightly.drift import MetricDrift, drift_finding, find_drifts
from compress.plugins.nightly.history import NightHistory
from compress.plugins.nightly.record import Host
from compress.recipe.policy import Policy, Rule

POLICY = Policy(rules=(Rule(metric="latency_ms", worse_by="3%"), Rule(metric="accuracy", worse_by="0.5 points")))
Drifts = Callable[..., list[MetricDrift]]


@pytest.fixture
def history(tmp_path: Path) -> NightHistory:
    return NightHistory(tmp_path / "history.sqlite", ignore)


def drifts(history: NightHistory, accepted: str | None = None, policy: Policy = POLICY) -> list[MetricDrift]:
    return find_drifts(history.series(SUITE), policy, accepted, history.read(SUITE)[-1])


def noisy(levels: Sequence[float], spread: float = 0.01) -> list[float]:
    random = np.random.default_rng(1)
    return [float(level * np.exp(random.normal(0, spread))) for level in levels]


def test_a_step_is_told_with_size_and_night(history: NightHistory) -> None:
    fill(history, noisy([1.0] * 30 + [1.06] * 5))
    (drift,) = drifts(history)
    assert (drift.first, drift.steps, drift.fails) == (31, 1, True)
    assert drift.effect == pytest.approx(0.06, abs=0.012)
    finding = drift_finding(
        drift, history.series(SUITE), {past_night.number: past_night for past_night in history.read(SUITE)}
    )
    assert finding.culprit == "tiny: latency_ms on cpu"
    assert finding.since == "night 31 (2026-08-31)"
    assert "+" in finding.what


@pytest.mark.parametrize(
    ("levels", "metric", "unit"),
    [
        ([1.0] * 35, "latency_ms", "ms"),
        ([1.0] * 30 + [0.9] * 5, "latency_ms", "ms"),  # faster
        ([1.0] * 20 + [1.06] * 10 + [1.0] * 10, "latency_ms", "ms"),  # mended
        ([1.0] * 30 + [1.02] * 30, "latency_ms", "ms"),  # below the margin
        ([1.0] * 30 + [1.06] * 5, "startup_ms", "ms"),  # no rule
        ([1.0] * 30 + [1.06] * 5, "latency_p99_ms", "ms"),  # no rule
    ],
)
def test_what_is_no_drift(history: NightHistory, levels: list[float], metric: str, unit: str) -> None:
    fill(history, noisy(levels), metric, unit)
    assert drifts(history) == []


def test_small_steps_add_up(history: NightHistory) -> None:
    fill(history, noisy([1.0] * 25 + [1.02] * 25 + [1.04] * 25, spread=0.004))
    (drift,) = drifts(history)
    assert (drift.steps, drift.first) == (2, 26)
    assert drift.effect == pytest.approx(0.04, abs=0.004)


def test_accuracy_drifts_in_points(history: NightHistory) -> None:
    fill(history, [0.9] * 10 + [0.892] * 3, "accuracy", "ratio")
    (drift,) = drifts(history)
    assert drift.effect == pytest.approx(-0.008)
    assert drift.series.written(drift.effect) == "-0.80 points"


def test_a_new_baseline_accepts_what_was_before_it(history: NightHistory) -> None:
    fill(history, noisy([1.0] * 20 + [1.06] * 20))
    after_step = (FIRST + timedelta(days=25)).isoformat()
    before_step = (FIRST + timedelta(days=5)).isoformat()
    assert len(drifts(history, accepted=before_step)) == 1
    assert drifts(history, accepted=after_step) == []


def test_another_host_and_an_entry_that_was_not_measured_tonight_are_left_alone(history: NightHistory) -> None:
    fill(history, noisy([1.0] * 30 + [1.06] * 5))
    other = Host(digest="bb", words="Another processor")
    history.append(night(36, host=other), {"tiny": (row("latency_ms", 9.0, "ms"),)})
    assert drifts(history) == []
    history.append(night(37, [outcome(status="failed")]), {})
    assert drifts(history) == []


def with_reference(history: NightHistory, levels: Sequence[float], machine: Sequence[float]) -> None:
    for number, (level, kernel) in enumerate(zip(noisy(levels, 0.005), machine, strict=True)):
        rows = (row("latency_ms", level, "ms"), row("reference_matmul_ms", kernel, "ms", "machine"))
        history.append(night(number, [outcome()]), {"tiny": rows})


def test_what_the_machine_did_is_no_fault_of_the_model(history: NightHistory) -> None:
    with_reference(history, [1.0] * 20 + [1.08] * 6, [5.0] * 20 + [5.4] * 6)
    (drift,) = drifts(history)
    # 1.08 / (5.4 / 5) = 1: nothing is left.
    assert drift.machine == pytest.approx(0.08)
    assert drift.net == pytest.approx(0.0, abs=0.006)
    assert not drift.fails


def test_what_the_machine_did_not_do_remains(history: NightHistory) -> None:
    with_reference(history, [1.0] * 20 + [1.12] * 6, [5.0] * 20 + [5.25] * 6)
    (drift,) = drifts(history)
    assert drift.net == pytest.approx(1.12 / 1.05 - 1, abs=0.006)
    assert drift.fails


def test_disturbed_nights_are_not_judged(history: NightHistory) -> None:
    for number, level in enumerate(noisy([1.0] * 20 + [2.0] * 5 + [1.0])):
        noise = "unusable" if 20 <= number < 25 else "quiet"
        history.append(night(number, [outcome(noise=noise)]), {"tiny": (row("latency_ms", level, "ms"),)})
    (series,) = history.series(SUITE)
    assert (len(series.points), len(series.usable), len(series.levels)) == (26, 21, 1)
    assert drifts(history) == []


def test_the_finding_names_what_was_new_that_night(history: NightHistory) -> None:
    for number, level in enumerate(noisy([1.0] * 20 + [1.08] * 5)):
        late = number >= 20
        rows = (row("latency_ms", level, "ms"), row("latency_ms", 2 * level, "ms", "baseline"))
        night_outcome = outcome(recipe_digest="bb" if late else "aa")
        software = {"onnxruntime": "1.32.0" if late else "1.31.0", "kernel": "6.1"}
        commit = ("c" if late else "b") * 40
        history.append(night(number, [night_outcome], software=software, commit=commit), {"tiny": rows})
    series, read = history.series(SUITE), history.read(SUITE)
    (drift,) = drifts(history)
    told_of = drift_finding(drift, series, {past_night.number: past_night for past_night in read})
    assert told_of.since == "night 21 (2026-08-21, commit ccccccc)"
    assert "the recipe was changed" in told_of.what
    assert "onnxruntime 1.31.0 \u2192 1.32.0" in told_of.what
    assert "kernel" not in told_of.what
    assert "the baseline model moved by +" in told_of.what
    assert all(line.host == HOST for line in series)
