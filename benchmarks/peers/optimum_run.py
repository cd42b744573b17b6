"""optimum-benchmark on an ONNX model folder, in the environment that `benchmarks/agreement.py` creates.

    PY peers/optimum_run.py '{"model": FOLDER, "threads": 1, "core": 0, "length": 32, "warm_up": 9, "runs": 9}' FILE

The JSON file has the latencies that optimum-benchmark reports, and the part of each that is spent in
`InferenceSession`. The `inline` launcher is used because the parent of the `process` launcher polls without a pause, on
the core to which both processes are pinned.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    """Pin the process, run the benchmark and write the results."""
    order = json.loads(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):
        # The process is pinned before torch is imported, since torch sets its thread count by the available cores.
        os.sched_setaffinity(0, [order["core"]])
    Path(sys.argv[2]).write_text(json.dumps(_time(order)))


def _time(order: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version

    import onnxruntime
    from optimum_benchmark import Benchmark, BenchmarkConfig, InferenceConfig, InlineConfig, ORTConfig

    session = onnxruntime.InferenceSession
    inside_ns: list[int] = []
    for name in ("run", "run_with_iobinding"):
        setattr(session, name, _with_timer(getattr(session, name), inside_ns))
    backend = ORTConfig(
        model=order["model"],
        task="text-classification",
        library="transformers",
        device="cpu",
        session_options={"intra_op_num_threads": order["threads"], "inter_op_num_threads": 1},
    )
    scenario = InferenceConfig(
        iterations=order["runs"],
        duration=0,
        warmup_runs=order["warm_up"],
        input_shapes={"batch_size": 1, "sequence_length": order["length"]},
        latency=True,
    )
    config = BenchmarkConfig(name="agreement", launcher=InlineConfig(), scenario=scenario, backend=backend)
    latencies = Benchmark.launch(config).forward.latency
    # The first call is reported separately, in addition to the warm-up.
    if len(inside_ns) != 1 + order["warm_up"] + order["runs"] or latencies.count != order["runs"]:
        raise SystemExit(f"{len(inside_ns)} session calls, but {latencies.count} are reported")
    packages = ("optimum-benchmark", "optimum", "transformers", "torch", "numpy")
    return {
        "onnxruntime": onnxruntime.__version__,
        "packages": {name: version(name) for name in packages},
        "io_binding": backend.use_io_binding,
        "p50_ms": 1e3 * float(latencies.p50),
        "latencies_ms": [1e3 * value for value in latencies.values],
        "session_ms": [value / 1e6 for value in inside_ns[-order["runs"] :]],
    }


def _with_timer(run: Callable[..., Any], durations_ns: list[int]) -> Callable[..., Any]:
    """Return ``run`` with a timer that appends the nanoseconds of each call to ``durations_ns``."""

    def timed(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter_ns()
        result = run(*arguments, **named)
        durations_ns.append(time.perf_counter_ns() - start)
        return result

    return timed


if __name__ == "__main__":
    main()
