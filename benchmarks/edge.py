"""The table of the edge: the quickstart's student in every format, its page, its bundle, and a device over SSH.

One command makes it. The recipe is run with the student's float weights as the baseline, so that every speed-up is that
of a format against itself in fp32, in one session of the same runtime. What tests prove is proven by running them.
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
"""The target whose ONNX file the other formats are held against."""
TARGETS = (REFERENCE, "ort", "browser", "litert", "executorch", "openvino")
MOST_POINTS, MOST_BYTES, LEAST_SPEEDUP = 0.5, 1.1, 2.0
PROVEN = {
    "tokenization of 10,000 lines in the bundle": "tests/plugins/apps -k ten_thousand_lines",
    "a flipped byte anywhere in a bundle": "tests/plugins/apps -k flipped",
    "foreign clients": "tests/clients",
}
"""What is shown, and the tests that show it."""


@dataclass(frozen=True)
class Row:
    """One line of the table; ``kept`` is None where nothing was asked or nothing could be had."""

    what: str
    found: str
    wanted: str = ""
    kept: bool | None = None

    def markdown(self) -> str:
        """As a line of Markdown."""
        verdict = {True: "", False: " **missed**", None: ""}[self.kept]
        return f"| {self.what} | {self.found}{verdict} | {self.wanted} |"


def main() -> None:
    """Run, measure, and write the table; exit code 1 where a floor is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / f"{RECIPE}.yaml")
    parser.add_argument("--artifacts", type=Path, default=ROOT / "artifacts")
    parser.add_argument("--float", default="distill", help="label of the student before it is exported and quantized")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument(
        "--only", choices=("formats", "page", "ssh", "tests"), action="append", help="parts of the table"
    )
    parser.add_argument("--remeasure", action="store_true", help="take times anew, also where the cache has some")
    parser.add_argument("--output", type=Path, help="write the rows and the report's figures as JSON")
    options = parser.parse_args()
    parts = options.only or ("formats", "page", "ssh", "tests")
    run = options.artifacts / "runs" / f"{RECIPE}-table" / "latest"
    if "formats" in parts or not run.exists():
        make_run(options)
    rows: list[Row] = []
    report = load_report(run / "report.json")
    if "formats" in parts:
        rows += formats(report, options.targets.split(","))
    if "page" in parts:
        rows += page(run)
    if "ssh" in parts:
        rows += ssh(run)
    if "tests" in parts:
        rows += [proven(what, tests) for what, tests in PROVEN.items()]
    lines = ["| what | found | wanted |", "|---|---|---|", *(row.markdown() for row in rows)]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.output:
        content = {"rows": [vars(row) for row in rows], "environment": environment()}
        options.output.write_text(json.dumps(content, indent=1) + "\n")
    sys.exit(any(row.kept is False for row in rows))


def make_run(options: argparse.Namespace) -> None:
    """Run the recipe for every format; missed limits are the recipe's business."""
    sets = [f"targets=[{options.targets}]", f"baseline={options.float}", f"name={RECIPE}-table", "limits=[]"]
    sets.append("benchmark.every_stage=false")
    command = [sys.executable, "-m", "compress", "run", str(options.recipe), "--artifacts", str(options.artifacts)]
    command += [argument for setting in sets for argument in ("--set", setting)]
    command += ["--remeasure"] if options.remeasure else []
    subprocess.run(command, check=True, stdout=sys.stderr)


def formats(report: Report, targets: Sequence[str]) -> Iterator[Row]:
    """Accuracy, bytes and speed of each format."""
    why = {skip.target: skip.reason for skip in report.skipped}
    accuracy = value(report, "accuracy", REFERENCE)
    size = value(report, "size_bytes", REFERENCE)
    for target in targets:
        if target in why:
            yield Row(target, f"not here: {why[target]}")
            continue
        target_accuracy, size_bytes = value(report, "accuracy", target), value(report, "size_bytes", target)
        points = 100 * (target_accuracy.value - accuracy.value)
        yield Row(
            f"{target}: accuracy on all {target_accuracy.n:,} test rows",
            f"{100 * target_accuracy.value:.2f}% ({points:+.2f} points)",
            f"at most {MOST_POINTS} points below ONNX",
            points >= -MOST_POINTS,
        )
        ratio = size_bytes.value / size.value
        yield Row(
            f"{target}: bytes",
            f"{size_bytes.value / 1e6:.2f} MB ({ratio:.3f}x)",
            f"at most {MOST_BYTES}x of ONNX",
            ratio <= MOST_BYTES,
        )
        faster, latency = value(report, "speedup", target), value(report, "latency_ms", target)
        interval = "" if faster.low is None else f" ({faster.low:.2f}-{faster.high:.2f})"
        yield Row(
            f"{target}: latency, batch 1",
            f"{latency.value:.2f} ms, {faster.value:.2f}x{interval} of its own fp32",
            f"{LEAST_SPEEDUP:g}x",
            faster.value >= LEAST_SPEEDUP,
        )


def value(report: Report, metric: str, target: str) -> Measurement:
    """A figure of the model that ships."""
    return next(row for row in report.measurements if (row.model, row.metric, row.target) == (FINAL, metric, target))


def page(run: Path) -> Iterator[Row]:
    """What a visitor of the page transfers and waits for."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "page"
        make = [sys.executable, "-m", "compress", "bundle", str(run), "--target", "browser", "-o", str(bundle)]
        subprocess.run(make, check=True, stdout=sys.stderr)
        timings = from_script("bundle_page.py", str(bundle))
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


def ssh(run: Path) -> Iterator[Row]:
    """The same bench here and over SSH."""
    timings = from_script("ssh.py", str(run))
    for line in timings["rows"]:
        if line["metric"].startswith("latency_ms"):
            apart = line["difference"]
            what = f"{line['metric']} over SSH against here, same machine"
            yield Row(what, f"{apart:+.1%}", "within 5%", abs(apart) <= 0.05)


def from_script(name: str, *arguments: str) -> Any:
    """What a script beside this one finds; its exit code is a verdict, and the rows here are judged anew."""
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(f"{name} failed; what it says is above.")
    return json.loads(done.stdout)


def proven(what: str, tests: str) -> Row:
    """Run tests and count."""
    command = [sys.executable, "-m", "pytest", "--durations=0", *tests.split(" ", 2)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sys.stderr.write(done.stdout)
    summary = done.stdout.strip().splitlines()[-1].strip("= ")
    return Row(f"{what} (`pytest {tests}`)", summary, "all pass", done.returncode == 0)


if __name__ == "__main__":
    main()
