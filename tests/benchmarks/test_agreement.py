"""The comparison with peers' timing loops: what it judges and how it goes on without a peer. Times nothing of note."""

import importlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from compress.benchmark.worker import write_batches
from compress.numerics.statistics import Estimate
from compress.tasks.task import Examples
from compress.utils.errors import DataError, StageError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def agreement(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("agreement")


@pytest.fixture
def perf_test(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("peers.perf_test")


@pytest.fixture
def peer_environment(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return importlib.import_module("peers.environment")


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [
        (Estimate(1.005, 0.98, 1.02), "within 3%"),
        (Estimate(1.05, 1.04, 1.06), "not within 3%"),
        (Estimate(0.9, 0.88, 0.92), "not within 3%"),
        # 3.2 points from the value to the far end, 1 point to the margin: 12 x 3.2^2 = 122.88 would do.
        (Estimate(1.02, 0.988, 1.05), "can't tell, 111 more repetitions might"),
    ],
)
def test_agreement_is_judged_by_the_whole_interval(agreement, ratio, verdict):
    assert agreement.judge(ratio, 12) == verdict


def test_ratios_pair_repetitions_so_that_drift_cancels(agreement):
    drifting = np.array([1.0, 3.0, 2.0, 5.0, 4.0, 9.0])
    rows = {row.name: row for row in agreement.compare({"compress": drifting, "perf_test loop": 1.01 * drifting})}
    assert rows["compress"].ratio is None
    assert rows["compress"].latency_ms == Estimate(3.5, 1.0, 9.0)
    assert rows["perf_test loop"].ratio == pytest.approx((1.01, 1.01, 1.01))
    assert rows["perf_test loop"].verdict == "within 3%"


def test_the_loop_reports_percentiles_as_the_tool_does(perf_test):
    percentiles = perf_test.statistics([7.0, 1.0, 9.0, 3.0, 5.0, 2.0, 8.0, 4.0, 10.0, 6.0])
    # Elements 5 and 9 of the sorted ten; no interpolation.
    assert (percentiles["p50_ms"], percentiles["p90_ms"], percentiles["p99_ms"]) == (6.0, 10.0, 10.0)
    assert (percentiles["mean_ms"], percentiles["min_ms"], percentiles["max_ms"]) == (5.5, 1.0, 10.0)


def test_the_loop_times_every_run_but_the_warm_up(perf_test, tmp_path):
    graph, batches = _doubling_graph(tmp_path / "model.onnx"), tmp_path / "batches.npz"
    write_batches(batches, [{"x": np.ones((1, 4), np.float32)}])
    timing = perf_test.time_graph(graph, batches, threads=1, runs=7)
    assert len(timing["latencies_ms"]) == 7
    assert all(latency > 0 for latency in timing["latencies_ms"])
    assert timing["mean_ms"] == pytest.approx(np.mean(timing["latencies_ms"]))
    assert timing["provider"] == "CPUExecutionProvider"


def test_the_input_is_one_row_of_known_tokens(agreement, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 50}))
    examples = agreement.one_input(tmp_path, 12)
    batch = examples.batch(range(len(examples)))
    assert batch["input_ids"].shape == (8, 12)
    assert (batch["input_ids"] == batch["input_ids"][0]).all()
    assert batch["input_ids"].max() < 50
    assert batch["attention_mask"].all()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"vocab_size": null}'])
def test_a_config_without_a_vocabulary_is_refused(agreement, tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match="config cannot be used"):
        agreement.one_input(tmp_path, 12)


def test_the_order_alternates_and_a_failing_optimum_is_left_out_with_its_reason(agreement, monkeypatch, tmp_path):
    calls = []

    def fake(name, fails_at=None):
        def way(*_):
            calls.append(name)
            if calls.count(name) == fails_at:
                raise StageError("out of order")
            return {"p50_ms": 1.0, "latencies_ms": [1.0], "session_ms": [0.9]}

        return way

    monkeypatch.setattr(agreement, "time_compress", fake("compress"))
    monkeypatch.setattr(agreement, "time_loop", fake("loop"))
    monkeypatch.setattr(agreement, "time_optimum", fake("optimum", fails_at=2))
    repetitions, reason = agreement.repeat_all(_setting(agreement, tmp_path), 3, Path("python"))
    assert calls == ["compress", "loop", "optimum", "optimum", "loop", "compress", "compress", "loop"]
    assert reason == "out of order"
    assert list(agreement.medians_ms(repetitions)) == ["compress", "perf_test loop"]

    monkeypatch.setattr(agreement, "time_loop", fake("broken loop", fails_at=1))
    with pytest.raises(StageError, match="out of order"):
        agreement.repeat_all(_setting(agreement, tmp_path), 1, None)


def test_the_session_s_part_of_optimum_is_a_row_of_its_own(agreement):
    sample = {
        "compress": {"latencies_ms": [2.0]},
        "perf_test loop": {"latencies_ms": [2.0]},
        "optimum-benchmark": {"latencies_ms": [2.2, 2.4, 2.2], "session_ms": [2.1, 2.0, 2.0]},
    }
    medians = agreement.medians_ms([sample] * 6)
    assert medians["optimum-benchmark"].tolist() == [2.2] * 6
    assert medians["optimum-benchmark, session alone"].tolist() == [2.0] * 6


def test_an_environment_that_cannot_be_made_says_why_and_is_tried_again(peer_environment, monkeypatch):
    commands = []

    def run(command):
        commands.append(command)
        if "install" in command and len(commands) <= 2:
            raise peer_environment.UnavailableError("no such version")
        return "a==1\n"

    monkeypatch.setattr(peer_environment, "_run", run)
    monkeypatch.setattr(peer_environment.shutil, "rmtree", lambda _: None)
    with pytest.raises(peer_environment.UnavailableError, match="no such version"):
        peer_environment.optimum_python(lambda _: None)
    home = Path(commands[0][-1])
    home.mkdir(parents=True)
    assert peer_environment.optimum_python(lambda _: None) == home / "bin" / "python"
    commands_before = len(commands)
    assert peer_environment.optimum_python(lambda _: None) == home / "bin" / "python"
    assert (commands_before, len(commands)) == (5, 5)


def test_a_failing_command_s_last_words_are_kept(peer_environment):
    command = [peer_environment.sys.executable, "-c", "import sys; sys.exit('the disk is full')"]
    with pytest.raises(peer_environment.UnavailableError, match="the disk is full"):
        peer_environment._run(command)


def _doubling_graph(path):
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "doubling", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def _setting(agreement, folder):
    examples = Examples([{"input_ids": np.ones(4, np.int64)}], {"input_ids": 0})
    return agreement.Setting(folder, folder, examples, folder, threads=1, core=0, runs=1, seconds=1.0)
