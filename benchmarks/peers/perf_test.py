"""The timing loop of ONNX Runtime's `onnxruntime_perf_test`, in Python, since the Python package has no such binary.

    python benchmarks/peers/perf_test.py '{"graph": ..., "batches": ..., "threads": 1, "core": 0, "runs": 1000}'

Follows its source (onnxruntime/test/perftest, `PerformanceRunner::Run` and `OnnxRuntimeTestSession::Run`): inputs are
converted to `OrtValue`s once; after one warm-up run, N runs on the same input are timed one by one around
`Session::Run`, with the same `OrtValue`s as outputs. Percentile q is element int(q N) of the sorted times. Prints one
JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PERCENTILES = {"p50_ms": 0.5, "p90_ms": 0.9, "p95_ms": 0.95, "p99_ms": 0.99, "p999_ms": 0.999}


def statistics(latencies_ms: Sequence[float]) -> dict[str, float]:
    """Return the statistics that the tool reports, in ms."""
    ordered = sorted(latencies_ms)
    percentiles = {name: ordered[int(len(ordered) * share)] for name, share in PERCENTILES.items()}
    return {"mean_ms": sum(ordered) / len(ordered), "min_ms": ordered[0], "max_ms": ordered[-1], **percentiles}


def time_graph(graph: Path, batches: Path, threads: int, runs: int) -> dict[str, Any]:
    """Open ``graph`` with the session options of compress and time runs on the first of ``batches``."""
    import onnxruntime

    from compress.benchmark.worker import read_batches
    from compress.formats.onnx.runtimes.onnxruntime import session_options

    session = onnxruntime.InferenceSession(graph, session_options(threads), providers=["CPUExecutionProvider"])
    batch = read_batches(batches)[0]
    inputs = {entry.name: onnxruntime.OrtValue.ortvalue_from_numpy(batch[entry.name]) for entry in session.get_inputs()}
    names = [entry.name for entry in session.get_outputs()]
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    # The warm-up run allocates the outputs, which all timed runs reuse.
    for name, value in zip(names, session.run_with_ort_values(names, inputs), strict=True):
        binding.bind_ortvalue_output(name, value)
    clock = time.perf_counter_ns
    nanoseconds = []
    for _ in range(runs):
        start = clock()
        session.run_with_iobinding(binding)
        nanoseconds.append(clock() - start)
    latencies_ms = [value / 1e6 for value in nanoseconds]
    return {
        "onnxruntime": onnxruntime.__version__,
        "provider": session.get_providers()[0],
        **statistics(latencies_ms),
        "latencies_ms": latencies_ms,
    }


def main() -> None:
    """Pin the process, time the graph and print the results."""
    order = json.loads(sys.argv[1])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, [order["core"]])
    timing = time_graph(Path(order["graph"]), Path(order["batches"]), order["threads"], order["runs"])
    sys.stdout.write(json.dumps(timing) + "\n")


if __name__ == "__main__":
    main()
