"""Compare compress's latency measurement with two others: ONNX Runtime's perf test loop and optimum-benchmark.

    python benchmarks/agreement.py --output agreement.json      # about ten minutes on two idle cores

All three measure one ONNX file (by default the sample `minilm` reduced to three layers, fp32) on one input of batch 1
and 32 tokens, on one thread pinned to one core, with the same session options and the same ONNX Runtime version:

- `compress`: `measure_together`, which `compress bench` uses.
- `perf_test loop`: the loop of `onnxruntime_perf_test` in Python (`peers/perf_test.py`), since the Python package of
  ONNX Runtime does not include that C++ tool.
- `optimum-benchmark`: its `onnxruntime` backend and `inference` scenario, in a separate virtual environment that the
  first run creates in the user's cache (`peers/optimum_run.py`).

Each is a separate process. They run one after the other in alternating order (A B C, C B A, ...), so that other load on
the machine affects all of them. Medians of the same repetition are compared. The interval of their ratio is the 95%
interval of the median over the repetitions (order statistics). A tool agrees if the whole interval lies within 3%.

Known differences: compress and the loop both time only `session.run`. compress also creates numpy arrays of the outputs
(a few microseconds) and pauses between turns, with two untimed calls after each. optimum-benchmark times
`ORTModel.forward`, which binds the inputs, computes output shapes, allocates and binds torch tensors, runs the session
and wraps the result. This Python code takes 0.1 ms to several ms for every model: 3% or more of a call of 3 ms,
less of a longer one (try `--length 128`). The report therefore has two rows for optimum-benchmark: `forward` as it
reports it, and the time within the session, which corresponds to the other two. Its token ids are random, but have the
same shape.

Exit code 1 if a tool disagrees on the time of the session, 2 for invalid input. If optimum-benchmark cannot be
installed or run, it is reported as skipped with the reason.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers.environment import UnavailableError, optimum_python
from peers.ways import Setting, time_compress, time_loop, time_optimum

from compress.benchmark.worker import write_batches
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel, find_graph
from compress.formats.quiet_output import quiet_libraries
from compress.numerics.differences import decide, samples_to_settle
from compress.numerics.statistics import IntervalEstimate, median_interval
from compress.tasks.task import Examples
from compress.utils.environment import environment, spread_cores
from compress.utils.errors import CompressError, DataError, StageError
from compress.utils.storage import digest_file

MARGIN = 0.03
THREADS = 1
MIN_LENGTH = 2
MIN_REPEATS = 6
"""A median of fewer values has no 95% interval."""
COMPRESS, LOOP, OPTIMUM = "compress", "perf_test loop", "optimum-benchmark"
OPTIMUM_SESSION = "optimum-benchmark, session alone"
SESSION_ROWS = (LOOP, OPTIMUM_SESSION)
"""Rows that time only the session, as compress does."""
_LABELS = ("negative", "positive")


@dataclass(frozen=True)
class Row:
    """Median latency of one tool over the repetitions, and its ratio to compress."""

    name: str
    latency_ms: IntervalEstimate
    ratio: IntervalEstimate | None
    verdict: str


def make_model(folder: Path) -> None:
    """Export the sample `minilm`, reduced to three layers, into ``folder`` in Hugging Face layout."""
    import torch

    from compress.data.samples.fetch import sample_directory
    from compress.formats.onnx.export import export_onnx
    from compress.models.transformer_pruning import keep_layers
    from compress.tasks.registry import TASKS

    torch.manual_seed(0)
    model = TASKS["text-classification"].load(sample_directory("minilm"), _LABELS, trust_remote_code=False)
    keep_layers(model.module, [0, 2, 5])
    examples = Examples(
        [{"input_ids": np.full(n, 1000), "attention_mask": np.ones(n, dtype=np.int64)} for n in (8, 32)],
        {"input_ids": 0, "attention_mask": 0},
    )
    exported = export_onnx(model, examples, None, fusions=True)
    OnnxModel(exported.graph, FLOAT_GRAPH, model.companions()).save(folder)


def repeated_input(model: Path, length: int) -> Examples:
    """Return eight copies of one random input, the minimum number of examples of a benchmark."""
    config = model / "config.json"
    try:
        vocabulary = int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"The model's config cannot be used: {error!r}", where=str(config), expected="a JSON object with vocab_size"
        ) from error
    tokens = {
        "input_ids": np.random.default_rng(0).integers(0, vocabulary, length),
        "attention_mask": np.ones(length, dtype=np.int64),
        "token_type_ids": np.zeros(length, dtype=np.int64),
    }
    return Examples([tokens] * 8, dict.fromkeys(tokens, 0))


def repeat_all(setting: Setting, repeats: int, python: Path | None) -> tuple[list[dict[str, Any]], str | None]:
    """Run every tool once per repetition, in alternating order. Also return why optimum-benchmark failed, if it did."""
    tools = {COMPRESS: lambda: time_compress(setting), LOOP: lambda: time_loop(setting)}
    if python is not None:
        tools[OPTIMUM] = lambda: time_optimum(setting, python)
    repetitions, reason = [], None
    for number in range(repeats):
        names = list(tools) if number % 2 == 0 else list(tools)[::-1]
        results: dict[str, Any] = {}
        for name in names:
            try:
                results[name] = tools[name]()
            except StageError as error:
                if name != OPTIMUM:
                    raise
                reason = str(error)
                del tools[OPTIMUM]
                _note(f"{OPTIMUM} is skipped from now on: {reason}")
        summary = ", ".join(f"{name} {results[name]['p50_ms']:.3f} ms" for name in names if name in results)
        _note(f"{number + 1} of {repeats}: {summary}")
        repetitions.append({"order": names, **results})
    return repetitions, reason


def medians_ms(repetitions: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Return the median latency of each repetition per tool, for tools that ran in every repetition."""
    names = [name for name in (COMPRESS, LOOP, OPTIMUM) if all(name in medians for medians in repetitions)]
    medians = {
        name: np.array([np.median(repetition[name]["latencies_ms"]) for repetition in repetitions]) for name in names
    }
    if OPTIMUM in medians:
        medians[OPTIMUM_SESSION] = np.array(
            [np.median(repetition[OPTIMUM]["session_ms"]) for repetition in repetitions]
        )
    return medians


def compare(medians: Mapping[str, np.ndarray]) -> list[Row]:
    """Compare each tool with compress within the same repetition and return a row per tool."""
    rows = []
    for name, values in medians.items():
        ratio = None if name == COMPRESS else _median_with_interval(values / medians[COMPRESS])
        rows.append(Row(name, _median_with_interval(values), ratio, "" if ratio is None else judge(ratio, len(values))))
    return rows


def judge(ratio: IntervalEstimate, repeats: int) -> str:
    """Return the verdict on whether ``ratio`` is 1 within the margin."""
    loss = IntervalEstimate(*(bound - 1 for bound in ratio))
    verdict = decide(loss, MARGIN)
    if verdict == "same":
        return f"within {MARGIN:.0%}"
    if verdict != "can't tell":
        return f"not within {MARGIN:.0%}"
    more = samples_to_settle(loss, MARGIN, repeats)
    return "inconclusive" if more is None else f"inconclusive, {more} more repetitions may settle it"


def _median_with_interval(values: np.ndarray) -> IntervalEstimate:
    return IntervalEstimate(float(np.median(values)), *median_interval(values))


def _note(line: str) -> None:
    sys.stderr.write(line + "\n")


def _show(rows: Sequence[Row], skipped: str | None, footer: str) -> None:
    lines = [f"{'':34}{'median ms':>10}  {'95% interval':18}{'ratio':>7}  {'95% interval':18}verdict"]
    for row in rows:
        value, low, high = row.latency_ms
        line = f"{row.name:34}{value:10.4f}  {f'{low:.4f} to {high:.4f}':18}"
        if row.ratio is not None:
            line += f"{row.ratio.value:7.4f}  {f'{row.ratio.low:.4f} to {row.ratio.high:.4f}':18}{row.verdict}"
        lines.append(line.rstrip())
    lines += [f"{OPTIMUM}: skipped, {skipped}"] if skipped else []
    sys.stdout.write("\n".join([*lines, footer]) + "\n")


def _measure(options: argparse.Namespace, scratch: Path) -> int:
    skipped, python = None, None
    try:
        python = optimum_python(_note)
    except UnavailableError as error:
        skipped = str(error)
        _note(f"{OPTIMUM} is skipped: {skipped}")
    model = options.model
    if model is None:
        model = scratch / "model"
        model.mkdir()
        make_model(model)
    examples = repeated_input(model, options.length)
    batches = scratch / "batches.npz"
    write_batches(batches, [examples.batch([0])])
    setting = Setting(
        model=model.absolute(),
        graph=find_graph(model).absolute(),
        examples=examples,
        batches=batches,
        threads=THREADS,
        core=spread_cores(THREADS)[0],
        runs=options.runs,
        seconds=options.seconds,
    )
    repetitions, failed = repeat_all(setting, options.repeats, python)
    skipped = skipped or failed
    rows = compare(medians_ms(repetitions))
    versions = {
        repetition[name]["onnxruntime"]
        for repetition in repetitions
        for name in repetition["order"]
        if name in repetition
    }
    conditions = f"{THREADS} thread, batch 1, {options.length} tokens"
    _show(rows, skipped, f"ONNX Runtime {', '.join(sorted(versions))}; {conditions}")
    if options.output is not None:
        _write(options.output, setting, rows, repetitions, skipped)
    return int(any(row.verdict.startswith("not") for row in rows if row.name in SESSION_ROWS))


def _write(path: Path, setting: Setting, rows: Sequence[Row], repetitions: Any, skipped: str | None) -> None:
    content = {
        "environment": environment(),
        "graph": {"sha256": digest_file(setting.graph), "size_bytes": setting.graph.stat().st_size},
        "setting": {
            "threads": THREADS,
            "core": setting.core,
            "length": int(setting.examples.lengths()[0]),
            "runs": setting.runs,
        },
        "rows": [
            {**asdict(row), "latency_ms": row.latency_ms._asdict(), "ratio": row.ratio and row.ratio._asdict()}
            for row in rows
        ],
        "skipped": {OPTIMUM: skipped} if skipped else {},
        "repetitions": repetitions,
    }
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """Print the table and, with `--output`, write the raw samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, help="folder of a text classifier in Hugging Face layout, with one ONNX file"
    )
    parser.add_argument("--length", type=int, default=32, help="tokens of the input (default: 32)")
    parser.add_argument("--repeats", type=int, default=12, help="repetitions (default: 12)")
    parser.add_argument(
        "--runs", type=int, default=1000, help="timed calls of each other tool per repetition (default: 1000)"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="sampling time of compress per repetition (default: 4)"
    )
    parser.add_argument("--output", type=Path, help="write the raw samples to this JSON file")
    options = parser.parse_args()
    if options.repeats < MIN_REPEATS:
        parser.error(f"--repeats {options.repeats}: an interval needs at least {MIN_REPEATS} repetitions")
    if options.length < MIN_LENGTH:
        parser.error(f"--length {options.length}: expected at least {MIN_LENGTH}")
    if options.runs < 1:
        parser.error(f"--runs {options.runs}: expected at least 1")
    if not options.seconds > 0:
        parser.error(f"--seconds {options.seconds:g}: expected a time above 0")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        parser.error(f"--output {options.output}: its folder does not exist")
    quiet_libraries()
    try:
        with tempfile.TemporaryDirectory(prefix="compress-agreement-") as scratch:
            return _measure(options, Path(scratch))
    except CompressError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
