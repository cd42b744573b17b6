from __future__ import annotations

import numpy as np
import pytest

from compress.bench.results import Memory, Starts, Writer
from compress.bench.rounds import Rounds

WRITER = Writer("final", "cpu", seed=0)


def eight_rounds(scale: float) -> list[list[float]]:
    """Rounds of three calls: r, r + 1 and r + 5 ms for r = 1..8, times ``scale``."""
    return [[scale * r, scale * (r + 1), scale * (r + 5)] for r in range(1, 9)]


@pytest.fixture
def rounds() -> Rounds:
    # In even rounds the calls go 0, 1, 2 and in odd ones 3, 4, 5.
    calls = [[0, 1, 2] if r % 2 == 0 else [3, 4, 5] for r in range(8)]
    return Rounds(calls, {"baseline": eight_rounds(3.0), "final": eight_rounds(1.0)})


def test_latency_is_the_median_of_all_calls(rounds: Rounds) -> None:
    latency, p90, p99 = WRITER.single(rounds, "final", np.full(6, 9))
    pooled = [1, 2, 6, 2, 3, 7, 3, 4, 8, 4, 5, 9, 5, 6, 10, 6, 7, 11, 7, 8, 12, 8, 9, 13]
    assert (latency.metric, latency.value, latency.unit, latency.n) == ("latency_ms", 6.5, "ms", 24)
    assert latency.raw == tuple(pooled)
    assert (p90.metric, p99.metric) == ("latency_p90_ms", "latency_p99_ms")
    # Position 23 * 0.9 = 20.7 between the ordered 10 and 11; 23 * 0.99 = 22.77 between 12 and 13.
    assert p90.value == pytest.approx(10.7)
    assert p99.value == pytest.approx(12.77)


def test_buckets_know_which_example_each_call_was(rounds: Rounds) -> None:
    lengths = np.array([2, 2, 2, 7, 7, 8])
    rows = {row.metric: row for row in WRITER.single(rounds, "final", lengths)[3:]}
    assert list(rows) == ["latency_ms_length_2_2", "latency_ms_length_7_7", "latency_ms_length_8_8"]
    assert rows["latency_ms_length_7_7"].raw == (2, 3, 4, 5, 6, 7, 8, 9)
    assert rows["latency_ms_length_8_8"].raw == (7, 9, 11, 13)
    assert rows["latency_ms_length_8_8"].value == 10
    # Four rounds are too few for a 95% interval.
    assert rows["latency_ms_length_8_8"].low is None


def test_throughput_counts_the_examples_of_a_round(rounds: Rounds) -> None:
    latency, throughput = WRITER.batched(rounds, "final", batch_size=4)
    assert (latency.metric, latency.value) == ("latency_ms_batch_4", 6.5)
    # 12 examples in 3r + 6 ms.
    assert throughput.raw == pytest.approx(tuple(12_000 / (3 * r + 6) for r in range(1, 9)))
    assert throughput.value == pytest.approx((12_000 / 18 + 12_000 / 21) / 2)
    assert (throughput.low, throughput.high) == pytest.approx((12_000 / 30, 12_000 / 9))


def test_speedup_pairs_the_rounds(rounds: Rounds) -> None:
    speedup = WRITER.speedup(rounds, "final", "baseline")
    assert (speedup.value, speedup.low, speedup.high, speedup.n) == pytest.approx((3.0, 3.0, 3.0, 8))
    own = WRITER.speedup(rounds, "baseline", "baseline")
    assert (own.value, own.low, own.raw) == (1.0, None, None)


def test_starts_and_memory_are_written_as_they_are() -> None:
    startup, load = WRITER.starts(Starts([300, 310, 320, 305, 900, 290], [20, 21, 22, 23, 24, 25]))
    assert (startup.metric, startup.value, startup.low, startup.high) == ("startup_ms", 307.5, 290, 900)
    assert (load.metric, load.value) == ("session_load_ms", 22.5)
    peak, batched, runtime = WRITER.memory(Memory(10, 30, 70), batch_size=32)
    assert [(row.metric, row.value, row.unit) for row in (peak, batched, runtime)] == [
        ("peak_memory_bytes", 30, "bytes"),
        ("peak_memory_bytes_batch_32", 70, "bytes"),
        ("runtime_memory_bytes", 10, "bytes"),
    ]
