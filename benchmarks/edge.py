"""Measure the quickstart's student in every format for edge devices, its web page, and a device over SSH.

    python benchmarks/edge.py [--only formats] [--output FILE]

The recipe is run with the student's float weights as the baseline, so that every speed-up compares a format with its
own fp32 version in one session of the same runtime. Properties that tests verify are reported by running these tests.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.results.report import FINAL, Measurement, Report, load_report
from compress.utils.environment import environment

ROOT = Path(__file__).parent.parent
RECIPE = "edge-quickstart"
REFERENCE = "cpu"
"""The target whose ONNX file the other formats are compared with."""
TARGETS = (REFERENCE, "ort", "browser", "litert", "executorch", "openvino")
MAX_POINTS_LOST, MAX_SIZE_RATIO, MIN_SPEEDUP = 0.5, 1.1, 2.0
TESTED = {
    "tokenization of 10,000 lines in the bundle": "tests/plugins/apps -k ten_thousand_lines",
    "a flipped byte anywhere in a bundle": "tests/plugins/apps -k flipped",
    "foreign clients": "tests/clients",
}
"""Properties and the arguments of pytest that verify them."""


@dataclass(frozen=True)
class Row:
    """A line of the table; ``met`` is None if nothing is required or measured."""

    quantity: str
    measured: str
    required: str = ""
    met: bool | None = None

    def markdown(self) -> str:
        """Return the row as a line of Markdown."""
        verdict = " **missed**" if self.met is False else ""
        return f"| {self.quantity} | {self.measured}{verdict} | {self.required} |"


def main() -> None:
    """Run, measure, and print the table. Exit code 1 if a requirement is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / f"{RECIPE}.yaml")
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts")
    parser.add_argument("--float", default="distill", help="label of the stage that returns the float student")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument(
        "--only", choices=("formats", "page", "ssh", "tests"), action="append", help="parts of the table to measure"
    )
    parser.add_argument("--remeasure", action="store_true", help="measure again instead of reading cached times")
    parser.add_argument("--output", type=Path, help="write the rows as JSON")
    options = parser.parse_args()
    parts = options.only or ("formats", "page", "ssh", "tests")
    run = options.artifacts / "runs" / f"{RECIPE}-table" / "latest"
    if "formats" in parts or not run.exists():
        run_recipe(options)
    rows: list[Row] = []
    report = load_report(run / "report.json")
    if "formats" in parts:
        rows += format_rows(report, options.targets.split(","))
    if "page" in parts:
        rows += page_rows(run)
    if "ssh" in parts:
        rows += ssh_rows(run)
    if "tests" in parts:
        rows += [test_row(quantity, tests) for quantity, tests in TESTED.items()]
    lines = ["| quantity | measured | required |", "|---|---|---|", *(row.markdown() for row in rows)]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.output:
        content = {"rows": [vars(row) for row in rows], "environment": environment()}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(any(row.met is False for row in rows))


def run_recipe(options: argparse.Namespace) -> None:
    """Run the recipe for every format, without its limits."""
    changes = [f"targets=[{options.targets}]", f"baseline={options.float}", f"name={RECIPE}-table", "limits=[]"]
    changes.append("benchmark.every_stage=false")
    command = [sys.executable, "-m", "compress", "run", str(options.recipe), "--artifacts", str(options.artifacts)]
    command += [argument for change in changes for argument in ("--set", change)]
    command += ["--remeasure"] if options.remeasure else []
    subprocess.run(command, check=True, stdout=sys.stderr)


def format_rows(report: Report, targets: Sequence[str]) -> Iterator[Row]:
    """Yield accuracy, size and latency of each format."""
    skipped = {skip.target: skip.reason for skip in report.skipped}
    reference_accuracy = measurement(report, "accuracy", REFERENCE)
    reference_size = measurement(report, "size_bytes", REFERENCE)
    for target in targets:
        if target in skipped:
            yield Row(target, f"skipped: {skipped[target]}")
            continue
        accuracy, size = measurement(report, "accuracy", target), measurement(report, "size_bytes", target)
        points = 100 * (accuracy.value - reference_accuracy.value)
        yield Row(
            f"{target}: accuracy on all {accuracy.n:,} test rows",
            f"{100 * accuracy.value:.2f}% ({points:+.2f} points)",
            f"at most {MAX_POINTS_LOST} points below ONNX",
            points >= -MAX_POINTS_LOST,
        )
        ratio = size.value / reference_size.value
        yield Row(
            f"{target}: bytes",
            f"{size.value / 1e6:.2f} MB ({ratio:.3f}x)",
            f"at most {MAX_SIZE_RATIO}x of ONNX",
            ratio <= MAX_SIZE_RATIO,
        )
        speedup, latency = measurement(report, "speedup", target), measurement(report, "latency_ms", target)
        interval = "" if speedup.low is None else f" ({speedup.low:.2f}-{speedup.high:.2f})"
        yield Row(
            f"{target}: latency, batch 1",
            f"{latency.value:.2f} ms, {speedup.value:.2f}x{interval} against its fp32 version",
            f"{MIN_SPEEDUP:g}x",
            speedup.value >= MIN_SPEEDUP,
        )


def measurement(report: Report, metric: str, target: str) -> Measurement:
    """Return a measurement of the final model."""
    return next(row for row in report.measurements if (row.model, row.metric, row.target) == (FINAL, metric, target))


def page_rows(run: Path) -> Iterator[Row]:
    """Yield the bytes that the web page transfers and the time to its first answer."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "page"
        command = [sys.executable, "-m", "compress", "bundle", str(run), "--target", "browser", "-o", str(bundle)]
        subprocess.run(command, check=True, stdout=sys.stderr)
        timings = run_script("bundle_page.py", str(bundle))
    transfer, samples = timings["transfer_bytes"], timings["samples"]["from_page_ready_ms"]
    yield Row(
        "browser bundle: transfer, runtime included, brotli",
        f"{transfer / 1e6:.2f} MB",
        "12 MB (aim 6)",
        transfer <= 12e6,
    )
    first = timings["from_page_ready_ms"]
    yield Row(
        "page ready to first answer, cold",
        f"{first:.0f} ms ({min(samples):.0f}-{max(samples):.0f} in {len(samples)} launches)",
        "3 s (aim 1)",
        first <= 3000,
    )


def ssh_rows(run: Path) -> Iterator[Row]:
    """Yield latencies over SSH compared with local ones on the same machine."""
    timings = run_script("ssh.py", str(run))
    for line in timings["rows"]:
        if line["metric"].startswith("latency_ms"):
            difference = line["difference"]
            quantity = f"{line['metric']} over SSH against local, same machine"
            yield Row(quantity, f"{difference:+.1%}", "within 5%", abs(difference) <= 0.05)


def run_script(name: str, *arguments: str) -> Any:
    """Return the JSON output of another benchmark. Its exit code is ignored, since the rows have their own verdicts."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(f"{name} failed; see its messages above.")
    return json.loads(done.stdout)


def test_row(quantity: str, tests: str) -> Row:
    """Run the tests and return their summary."""
    command = [sys.executable, "-m", "pytest", "--durations=0", *tests.split(" ", 2)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(done.stdout)
    summary = done.stdout.strip().splitlines()[-1].strip("= ")
    return Row(f"{quantity} (`pytest {tests}`)", summary, "all pass", done.returncode == 0)


if __name__ == "__main__":
    main()
