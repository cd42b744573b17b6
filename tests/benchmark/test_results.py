from __future__ import annotations

import numpy as np
import pytest

from compress.benchmark.results import MeasurementWriter
from compress.benchmark.rounds import RoundTimes, TimedRounds

WRITER = MeasurementWriter("final", "cpu", seed=0)


def eight_rounds(scale: float) -> list[RoundTimes]:
    """Rounds of three calls: r, r + 1 and r + 5 ms for r = 1..8, times ``scale``, and twice that of the processor."""
    return [
        RoundTimes(
            [scale * r, scale * (r + 1), scale * (r + 5)],
            [False] * 3,
            cpu_ms=2 * scale * (3 * r + 6),
            energy_mj=30.0 * r,
        )
        for r in range(1, 9)
    ]


@pytest.fixture
def rounds() -> TimedRounds:
    # In even rounds the calls go 0, 1, 2 and in odd ones 3, 4, 5; four launches of two rounds.
    calls = [[0, 1, 2] if r % 2 == 0 else [3, 4, 5] for r in range(8)]
    launches = [r // 2 for r in range(8)]
    return TimedRounds(calls, launches, {"baseline": eight_rounds(3.0), "final": eight_rounds(1.0)})


def test_latency_is_the_median_of_all_calls(rounds: TimedRounds) -> None:
    latency, p90, p99 = WRITER.single(rounds, "final", np.full(6, 9))
    pooled = [1, 2, 6, 2, 3, 7, 3, 4, 8, 4, 5, 9, 5, 6, 10, 6, 7, 11, 7, 8, 12, 8, 9, 13]
    assert (latency.metric, latency.value, latency.unit, latency.n) == ("latency_ms", 6.5, "ms", 24)
    assert latency.raw == tuple(pooled)
    assert (p90.metric, p99.metric) == ("latency_p90_ms", "latency_p99_ms")
    # Position 23 * 0.9 = 20.7 between the ordered 10 and 11; 23 * 0.99 = 22.77 between 12 and 13.
    assert p90.value == pytest.approx(10.7)
    assert p99.value == pytest.approx(12.77)


def test_buckets_know_which_example_each_call_was(rounds: TimedRounds) -> None:
    lengths = np.array([2, 2, 2, 7, 7, 8])
    rows = {row.metric: row for row in WRITER.single(rounds, "final", lengths)[3:]}
    assert list(rows) == ["latency_ms_length_2_2", "latency_ms_length_7_7", "latency_ms_length_8_8"]
    assert rows["latency_ms_length_7_7"].raw == (2, 3, 4, 5, 6, 7, 8, 9)
    assert rows["latency_ms_length_8_8"].raw == (7, 9, 11, 13)
    assert rows["latency_ms_length_8_8"].value == 10
    assert rows["latency_ms_length_8_8"].low == 7


def test_a_bucket_of_which_no_example_had_its_turn_has_no_row(rounds: TimedRounds) -> None:
    lengths = np.array([2, 2, 2, 7, 7, 7, 9, 9])
    rows = [row.metric for row in WRITER.single(rounds, "final", lengths)[3:]]
    assert rows == ["latency_ms_length_2_2", "latency_ms_length_7_7"]


def test_throughput_counts_the_examples_of_a_round(rounds: TimedRounds) -> None:
    latency, throughput = WRITER.batched(rounds, "final", batch_size=4)
    assert (latency.metric, latency.value) == ("latency_ms_batch_4", 6.5)
    # 12 examples in 3r + 6 ms.
    assert throughput.raw == pytest.approx(tuple(12_000 / (3 * r + 6) for r in range(1, 9)))
    assert throughput.value == pytest.approx((12_000 / 18 + 12_000 / 21) / 2)
    assert (throughput.low, throughput.high) == pytest.approx((12_000 / 30, 12_000 / 9))


def test_speedup_pairs_the_calls(rounds: TimedRounds) -> None:
    speedup = WRITER.speedup("speedup", rounds, "final", "baseline")
    assert (speedup.value, speedup.low, speedup.high, speedup.n) == pytest.approx((3.0, 3.0, 3.0, 4))
    baseline_speedup = WRITER.speedup("speedup", rounds, "baseline", "baseline")
    assert (baseline_speedup.value, baseline_speedup.low, baseline_speedup.raw, baseline_speedup.n) == (
        1.0,
        None,
        None,
        4,
    )


def test_two_launches_are_too_few_for_an_interval_of_a_quantile() -> None:
    short = TimedRounds([[0], [0]], [0, 1], {"final": [RoundTimes([1.0]), RoundTimes([2.0])]})
    latency, _, _ = WRITER.single(short, "final", np.full(1, 9))
    assert (latency.value, latency.low, latency.high) == (1.5, None, None)


def test_consumption_is_counted_for_a_call(rounds: TimedRounds) -> None:
    processor, energy = WRITER.consumption(rounds, "final")
    # 2 (3 r + 6) / 3 ms and 30 r / 3 mJ a call, r = 1..8.
    assert (processor.metric, processor.value) == ("cpu_ms", pytest.approx(2 * (3 * 4.5 + 6) / 3))
    assert (energy.metric, energy.unit, energy.value) == ("energy_mj", "mJ", 45.0)


def test_without_a_counter_there_is_no_energy() -> None:
    rounds = TimedRounds([[0]], [0], {"final": [RoundTimes([1.0], cpu_ms=1.0)]})
    assert [row.metric for row in WRITER.consumption(rounds, "final")] == ["cpu_ms"]


def test_server_latency_has_its_rate_in_its_name() -> None:
    median, tail = WRITER.server([[1.0, 2.0, 3.0], [4.0, 5.0, 96.0], [1.0, 1.0, 1.0]], 250.0)
    assert (median.metric, median.value, median.n) == ("latency_ms_rate_250", 2.0, 9)
    # Position 8 * 0.99 = 7.92 between the ordered 5 and 96.
    assert (tail.metric, tail.value) == ("latency_p99_ms_rate_250", pytest.approx(5 + 0.92 * 91))
