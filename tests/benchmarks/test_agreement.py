"""The comparison with peers' timing loops: what it judges and how it goes on without a peer. Times nothing of note."""

import importlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.benchmark.worker import write_batches
from compress.numerics.statistics import IntervalEstimate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def agreement(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("agreement")


@pytest.fixture
def perf_test(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers.perf_test")


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (IntervalEstimate(1.005, 0.98, 1.02), "within 3%"),
        (IntervalEstimate(1.05, 1.04, 1.06), "not within 3%"),
        (IntervalEstimate(0.9, 0.88, 0.92), "not within 3%"),
        # 3.2 points from the value to the far end, 1 point to the margin: 12 x 3.2^2 = 122.88 would do.
        (IntervalEstimate(1.02, 0.988, 1.05), "can't tell, 111 more repetitions might"),
    ],
)
def test_agreement_is_judged_by_the_whole_interval(agreement, ratio, verdict):
    assert agreement.judge(ratio, 12) == verdict


def test_ratios_pair_repetitions_so_that_drift_cancels(agreement):
    drifting = np.array([1.0, 3.0, 2.0, 5.0, 4.0, 9.0])
    rows = {row.name: row for row in agreement.compare({"compress": drifting, "perf_test loop": 1.01 * drifting})}
    assert rows["compress"].ratio is None
    assert rows["compress"].latency_ms == IntervalEstimate(3.5, 1.0, 9.0)
    assert rows["perf_test loop"].ratio == pytest.approx((1.01, 1.01, 1.01))
    assert rows["perf_test loop"].verdict == "within 3%"


def test_the_loop_times_every_run_but_the_warm_up(perf_test, tmp_path):
    graph, batches = _doubling_graph(tmp_path / "model.onnx"), tmp_path / "batches.npz"
    write_batches(batches, [{"x": np.ones((1, 4), np.float32)}])
    timing = perf_test.time_graph(graph, batches, threads=1, runs=7)
    assert len(timing["latencies_ms"]) == 7
    assert all(latency > 0 for latency in timing["latencies_ms"])
    assert timing["mean_ms"] == pytest.approx(np.mean(timing["latencies_ms"]))
    assert timing["provider"] == "CPUExecutionProvider"


def _doubling_graph(path):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubling", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path
