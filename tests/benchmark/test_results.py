"""Tests of measurements and profile rows, computed from times with values by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import profiles
import pytest
from onnx import helper
from onnx_graphs import onnx_model

from compress.benchmark.operators import node_rows, operator_ms, typical_time, whole_row
from compress.benchmark.profile import OperatorProfile, combine, total
from compress.benchmark.results import MeasurementWriter
from compress.benchmark.rounds import RoundTimes, TimedRounds
from compress.formats.onnx.costs import GraphCost, NodeCost, Operations
from compress.formats.onnx.runtimes.profile import CallRun, NodeRun
from compress.numerics.roofline import Roof

WRITER = MeasurementWriter("final", "cpu", seed=0)


def eight_rounds(scale: float) -> list[RoundTimes]:
    """Return eight rounds of three calls of r, r + 1 and r + 5 ms for r = 1..8, times ``scale``.

    The CPU time of a round is twice its latencies, and its energy is 30 r mJ.
    """
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
    # Even rounds call examples 0, 1, 2 and odd rounds 3, 4, 5; there are four launches of two rounds.
    calls = [[0, 1, 2] if r % 2 == 0 else [3, 4, 5] for r in range(8)]
    launches = [r // 2 for r in range(8)]
    return TimedRounds(calls, launches, {"baseline": eight_rounds(3.0), "final": eight_rounds(1.0)})


def test_latency_is_median_of_all_calls(rounds: TimedRounds) -> None:
    latency, p90, p99 = WRITER.single(rounds, "final", np.full(6, 9))
    pooled = [1, 2, 6, 2, 3, 7, 3, 4, 8, 4, 5, 9, 5, 6, 10, 6, 7, 11, 7, 8, 12, 8, 9, 13]
    assert (latency.metric, latency.value, latency.unit, latency.n) == ("latency_ms", 6.5, "ms", 24)
    assert latency.raw == tuple(pooled)
    assert (p90.metric, p99.metric) == ("latency_p90_ms", "latency_p99_ms")
    # Position 23 * 0.9 = 20.7 between the ordered 10 and 11; 23 * 0.99 = 22.77 between 12 and 13.
    assert p90.value == pytest.approx(10.7)
    assert p99.value == pytest.approx(12.77)


def test_length_buckets_contain_calls_of_their_examples(rounds: TimedRounds) -> None:
    rows = {row.metric: row for row in WRITER.single(rounds, "final", np.array([2, 2, 2, 7, 7, 8]))[3:]}
    assert list(rows) == ["latency_ms_length_2_2", "latency_ms_length_7_7", "latency_ms_length_8_8"]
    assert rows["latency_ms_length_7_7"].raw == (2, 3, 4, 5, 6, 7, 8, 9)
    assert rows["latency_ms_length_8_8"].raw == (7, 9, 11, 13)
    assert rows["latency_ms_length_8_8"].value == 10
    assert rows["latency_ms_length_8_8"].low == 7

    # A bucket without a timed example has no row.
    metrics = [row.metric for row in WRITER.single(rounds, "final", np.array([2, 2, 2, 7, 7, 7, 9, 9]))[3:]]
    assert metrics == ["latency_ms_length_2_2", "latency_ms_length_7_7"]


def test_throughput_counts_examples_per_round(rounds: TimedRounds) -> None:
    latency, throughput = WRITER.batched(rounds, "final", batch_size=4)
    assert (latency.metric, latency.value) == ("latency_ms_batch_4", 6.5)
    # 12 examples in 3r + 6 ms.
    assert throughput.raw == pytest.approx(tuple(12_000 / (3 * r + 6) for r in range(1, 9)))
    assert throughput.value == pytest.approx((12_000 / 18 + 12_000 / 21) / 2)
    assert (throughput.low, throughput.high) == pytest.approx((12_000 / 30, 12_000 / 9))


def test_speedup_is_computed_from_paired_calls(rounds: TimedRounds) -> None:
    speedup = WRITER.speedup("speedup", rounds, "final", "baseline")
    assert (speedup.value, speedup.low, speedup.high, speedup.n) == pytest.approx((3.0, 3.0, 3.0, 4))
    baseline = WRITER.speedup("speedup", rounds, "baseline", "baseline")
    assert (baseline.value, baseline.low, baseline.raw, baseline.n) == (1.0, None, None, 4)


def test_two_launches_give_no_interval_of_a_quantile() -> None:
    short = TimedRounds([[0], [0]], [0, 1], {"final": [RoundTimes([1.0]), RoundTimes([2.0])]})
    latency, _, _ = WRITER.single(short, "final", np.full(1, 9))
    assert (latency.value, latency.low, latency.high) == (1.5, None, None)


def test_cpu_time_and_energy_are_per_call(rounds: TimedRounds) -> None:
    processor, energy = WRITER.consumption(rounds, "final")
    # 2 (3 r + 6) / 3 ms and 30 r / 3 mJ a call, r = 1..8.
    assert (processor.metric, processor.value) == ("cpu_ms", pytest.approx(2 * (3 * 4.5 + 6) / 3))
    assert (energy.metric, energy.unit, energy.value) == ("energy_mj", "mJ", 45.0)


def test_energy_is_absent_without_a_counter() -> None:
    rounds = TimedRounds([[0]], [0], {"final": [RoundTimes([1.0], cpu_ms=1.0)]})
    assert [row.metric for row in WRITER.consumption(rounds, "final")] == ["cpu_ms"]


def test_server_latency_metric_name_contains_the_rate() -> None:
    median, tail = WRITER.server([[1.0, 2.0, 3.0], [4.0, 5.0, 96.0], [1.0, 1.0, 1.0]], 250.0)
    assert (median.metric, median.value, median.n) == ("latency_ms_rate_250", 2.0, 9)
    # Position 8 * 0.99 = 7.92 between the ordered 5 and 96.
    assert (tail.metric, tail.value) == ("latency_p99_ms_rate_250", pytest.approx(5 + 0.92 * 91))


ROOF = Roof(bytes_per_s=10e9, fp32_per_s=100e9, int8_per_s=400e9)


def graph(names: Sequence[str]) -> ir.Graph:
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name) for i, name in enumerate(names)]
    return ir.from_proto(onnx_model(nodes, {"t0": [1]}, {f"t{len(names)}": [1]})).graph


def call(**microseconds: int) -> CallRun:
    return {f"{name}#{index}": NodeRun(value, ()) for index, (name, value) in enumerate(microseconds.items())}


def cost(fp32: int, moved: int) -> NodeCost:
    return NodeCost(Operations(fp32), weight_bytes=moved, read_bytes=0, written_bytes=0)


def test_typical_time_is_robust_to_disturbances() -> None:
    """Two calls of 2 and 4 ms; a different call is disturbed in each of two passes."""
    assert typical_time([[2, 90], [80, 4], [2, 4]]) == 3
    assert typical_time(np.array([[1.0], [2.0], [9.0]])) == 2


def test_profile_row_is_mean_over_calls() -> None:
    """Node a takes 10 and 30 µs.

    Call 1 is compute-bound (1 MFLOP: 10 µs) and call 2 memory-bound (200 kB: 20 µs).
    """
    runs = [[call(a=10, b=5), call(a=30, b=5)]] * 3
    costs = [
        GraphCost({"a#0": cost(1_000_000, 50_000), "b#1": None}, 0),
        GraphCost({"a#0": cost(1_000_000, 200_000), "b#1": None}, 0),
    ]
    first, second = node_rows(graph(["a#0", "b#1"]), runs, costs, {"a#0": "one", "b#1": "two"}, ROOF)
    assert (first.name, first.operators, first.layer) == ("a", ("Relu",), "one")
    assert first.time_ms == pytest.approx(0.020)
    assert (first.fp32_operations, first.weight_bytes) == (1_000_000, 125_000)
    assert first.compute_bound_ms == pytest.approx(0.010 / 2)
    assert first.memory_bound_ms == pytest.approx(0.020 / 2)
    assert first.share_of_roof == pytest.approx(0.015 / 0.020)
    assert (second.uncounted_ms, second.time_ms) == (pytest.approx(0.005), pytest.approx(0.005))
    assert (second.share_of_roof, second.bottleneck, second.counted) == (None, None, False)
    assert operator_ms(runs[0][1]) == pytest.approx(0.035)


def test_node_of_unknown_cost_in_one_call_is_uncounted() -> None:
    costs = [GraphCost({"a#0": cost(10, 10)}, 0), GraphCost({"a#0": None}, 0)]
    (only,) = node_rows(graph(["a#0"]), [[call(a=10), call(a=30)]], costs, {"a#0": "one"}, ROOF)
    assert (only.uncounted_ms, only.fp32_operations, only.limit_ms) == (only.time_ms, 0, 0)


def test_node_that_did_not_run_has_no_row() -> None:
    costs = [GraphCost({"a#0": cost(10, 10), "b#1": None}, 0)]
    rows = node_rows(graph(["a#0", "b#1"]), [[call(a=10)]], costs, {"a#0": "one", "b#1": "two"}, ROOF)
    assert [row.name for row in rows] == ["a"]


def test_rates_and_bottleneck_of_a_row() -> None:
    """The node needs 1 ms for 20 MFLOP and 1 MB, while its bound is 0.2 ms."""
    row = profiles.row("a", "MatMul")
    assert (row.operations_per_s, row.bytes_per_s, row.intensity) == (20e9, 1e9, 20)
    assert row.share_of_roof == pytest.approx(0.2)
    assert row.bottleneck == "overhead"
    assert profiles.row("a", "MatMul", time_ms=0.5).bottleneck == "compute"
    assert profiles.row("a", "Gather", compute_bound_ms=0.0, memory_bound_ms=0.4).bottleneck == "memory"


def test_rows_are_combined_by_sums() -> None:
    rows = [profiles.row("a", "MatMul"), profiles.row("b", "Add", memory_bound_ms=0.1), profiles.row("c", "MatMul")]
    products, sums = combine(rows, lambda row: row.operators[0])
    assert (products.name, products.nodes, products.time_ms, products.fp32_operations) == ("MatMul", 2, 2.0, 40e6)
    assert sums.limit_ms == pytest.approx(0.3)
    everything = total("all", [products, sums])
    assert (everything.nodes, everything.operators) == (3, ("MatMul", "Add"))
    assert everything.layer == "encoder.layer.0.feed-forward"
    assert total("two", [*rows, profiles.row("d", "Add", layer="head")]).layer is None


def test_whole_row_is_scaled_to_time_without_profiling() -> None:
    """The rows take 3 ms, 1 ms of it uncounted, and the call without profiling takes 6 ms.

    Scaled to 6 ms, 2 ms are uncounted, and the bound is 0.4 of the other 4 ms.
    """
    rows = [profiles.row("a", "MatMul"), profiles.row("b", "MatMul"), profiles.row("c", "Einsum", uncounted_ms=1.0)]
    rows[2] = rows[2].model_copy(update={"compute_bound_ms": 0.0})
    whole = whole_row(rows, 6.0)
    assert (whole.time_ms, whole.uncounted_ms, whole.limit_ms) == (6.0, pytest.approx(2.0), pytest.approx(0.4))
    assert whole.share_of_roof == pytest.approx(0.1)


def test_profile_survives_json_round_trip() -> None:
    profile = profiles.profile()
    content = json.loads(json.dumps(profile.to_json()))
    assert content["schema"] == 1
    assert content["profiler_overhead"] == pytest.approx(0.2)
    assert [row["name"] for row in content["by_operator"]] == ["MatMul", "DynamicQuantizeMatMul", "Gather", "Einsum"]
    assert [row["name"] for row in content["by_layer"]] == [
        "embeddings.word_embeddings",
        "encoder.layer.0.feed-forward",
        "encoder.layer.0.attention",
    ]
    assert content["whole"]["share_of_roof"] == pytest.approx(0.86 / 4.375)
    assert OperatorProfile.model_validate(profile.model_dump(by_alias=True)) == profile


@pytest.mark.parametrize(("cache", "cached"), [(2_000_000, True), (1_999_999, False), (None, None)])
def test_working_set_is_compared_with_cache_size(cache: int | None, cached: bool | None) -> None:
    assert profiles.limits(last_level_cache_bytes=cache).cached is cached
