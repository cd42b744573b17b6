"""One artifact benchmarked locally and over SSH on the same machine, alternately: do the medians agree within 5%?"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from loopback_sshd import find_binary, running

from compress.benchmark.restarts import LOCAL_HOST, BenchmarkHost
from compress.benchmark.session import BenchmarkResult
from compress.evaluation.evaluate import encode_for_model
from compress.formats.quiet_output import quiet_libraries
from compress.formats.targets import TARGETS
from compress.pipeline.artifact import find_artifact
from compress.pipeline.timing import time_artifacts
from compress.plugins.devices.device_host import DeviceHost
from compress.report.progress import ConsoleProgress

METRICS = ("latency_ms", "startup_ms", "session_load_ms", "peak_memory_bytes")
ORDER = ("here", "ssh", "ssh", "here")
MAX_DIFFERENCE = 0.05


def medians(results: list[BenchmarkResult]) -> dict[str, float]:
    """Return the median over the raw samples of all sessions, by metric."""
    raw: dict[str, list[float]] = {}
    for result in results:
        for row in result.measurements:
            if row.model == "artifact" and row.raw is not None and (row.metric in METRICS or "batch" in row.metric):
                raw.setdefault(row.metric, []).extend(row.raw)
    return {metric: float(np.median(samples)) for metric, samples in raw.items() if "speedup" not in metric}


def main() -> None:
    """Print a line for each metric. The exit code is 1 if median latencies differ by more than 5%."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path, help="folder of a run or of a model")
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--seconds", type=float, default=5.0, help="sampling time of each session and scenario")
    parser.add_argument("--cache", type=Path, help="folder for the device's cache, to reuse its environment")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    binary = find_binary()
    if binary is None:
        parser.error("sshd is not installed (Debian package openssh-server)")
    quiet_libraries()
    progress = ConsoleProgress()
    artifact = find_artifact(options.artifact, options.recipe)
    rows = artifact.dataset(progress).split("test")
    encoded = encode_for_model(
        artifact.folder, artifact.task, rows, artifact.recipe.data.max_length, artifact.recipe.evaluation
    )
    settings = artifact.recipe.benchmark.model_copy(update={"seconds": options.seconds})

    def measure(host: BenchmarkHost, seconds: float) -> BenchmarkResult:
        short_settings = settings.model_copy(update={"seconds": seconds})
        return time_artifacts(
            artifact.task,
            {"artifact": artifact.folder},
            {"artifact": encoded},
            TARGETS["cpu"],
            short_settings,
            "artifact",
            progress,
            artifact.recipe.seed,
            host=host,
        )

    with tempfile.TemporaryDirectory() as scratch, running(binary, Path(scratch)) as server:
        cache = (options.cache or Path(scratch) / "cache").absolute()
        hosts: dict[str, BenchmarkHost] = {
            "here": LOCAL_HOST,
            "ssh": DeviceHost("loopback", server.device(cache), server.folder),
        }
        # Create the environment and copy the files before the timed sessions.
        measure(hosts["ssh"], 0.1)
        progress.note("Timing")
        results: dict[str, list[BenchmarkResult]] = {"here": [], "ssh": []}
        for name in ORDER:
            results[name].append(measure(hosts[name], options.seconds))
    local_ms, ssh_ms = medians(results["here"]), medians(results["ssh"])
    lines: list[dict[str, Any]] = [
        {
            "metric": metric,
            "here": local_ms[metric],
            "ssh": ssh_ms[metric],
            "difference": ssh_ms[metric] / local_ms[metric] - 1,
        }
        for metric in local_ms
    ]
    notes = {name: [result.notes[0] for result in results_of_model] for name, results_of_model in results.items()}
    if options.json:
        sys.stdout.write(json.dumps({"rows": lines, "notes": notes}, indent=2) + "\n")
    else:
        for line in lines:
            sys.stdout.write(
                f"{line['metric']:<32} {line['here']:14.4f} here {line['ssh']:14.4f} ssh {line['difference']:+8.1%}\n"
            )
        for name, results_of_model in notes.items():
            sys.stdout.writelines(f"{name}: {note}\n" for note in results_of_model)
    if any(abs(line["difference"]) > MAX_DIFFERENCE for line in lines if line["metric"].startswith("latency")):
        sys.exit(1)


if __name__ == "__main__":
    main()
