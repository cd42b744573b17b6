"""optimum-benchmark on an ONNX model folder; runs in the environment that `benchmarks/agreement.py` makes for it.

    PY peers/optimum_run.py '{"model": FOLDER, "threads": 1, "core": 0, "length": 32, "warm_up": 9, "runs": 9}' FILE

FILE, which is JSON, has the latencies as optimum-benchmark reports them, and beside each the part of it that was
spent within `InferenceSession`. The `inline` launcher is taken because this process is of its own already: the
`process` launcher's parent polls without a pause meanwhile, on the very core to which both are pinned.
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
    """Pin, time, answer."""
    order = json.loads(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):
        # Before torch is imported, which counts its threads by the cores granted.
        os.sched_setaffinity(0, [order["core"]])
    Path(sys.argv[2]).write_text(json.dumps(_time(order)))


def _time(order: dict[str, Any]) -> dict[str, Any]:
    from importlib.metadata import version

    import onnxruntime
    from optimum_benchmark import Benchmark, BenchmarkConfig, InferenceConfig, InlineConfig, ORTConfig

    session = onnxruntime.InferenceSession
    inside_ns: list[int] = []
    for name in ("run", "run_with_iobinding"):
        setattr(session, name, _watched(getattr(session, name), inside_ns))
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
    # One more than the warm-up: the first call is reported apart.
    if len(inside_ns) != 1 + order["warm_up"] + order["runs"] or latencies.count != order["runs"]:
        raise SystemExit(f"{len(inside_ns)} calls of the session for {latencies.count} reported ones")
    packages = ("optimum-benchmark", "optimum", "transformers", "torch", "numpy")
    return {
        "onnxruntime": onnxruntime.__version__,
        "packages": {name: version(name) for name in packages},
        "io_binding": backend.use_io_binding,
        "p50_ms": 1e3 * float(latencies.p50),
        "latencies_ms": [1e3 * value for value in latencies.values],
        "session_ms": [value / 1e6 for value in inside_ns[-order["runs"] :]],
    }


def _watched(run: Callable[..., Any], taken_ns: list[int]) -> Callable[..., Any]:
    """``run``, whose every call adds its nanoseconds to ``taken_ns``."""

    def watched(*arguments: Any, **named: Any) -> Any:
        start = time.perf_counter_ns()
        result = run(*arguments, **named)
        taken_ns.append(time.perf_counter_ns() - start)
        return result

    return watched


if __name__ == "__main__":
    main()
