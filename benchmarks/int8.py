"""INT8 by everyone's defaults and by our recipes, on each model: answers kept, size, speed at batch 1 in one session.

    python benchmarks/int8.py                                       # every model; about an hour on two idle cores
    python benchmarks/int8.py recipes/minilm-int8.yaml --minutes 4 --output int8.json
    python benchmarks/int8.py --minutes 0                           # makes and judges the files, and keeps them
    python benchmarks/int8.py --again --minutes 8                   # times the files that the last one kept

Each file is kept when it is written, and each model's table when it is judged and when it is timed, below
`ARTIFACTS/benchmarks`: the same command again goes on where a stopped one was. What came of other stages is made anew.

A recipe's stages are run, or taken from the cache. ONNX Runtime (`quantize_dynamic`, `quantize_static`) and NNCF
(`onnx_int8`) get its float graph by their defaults, and the exporter's own one where that differs, with the calibration
examples that the recipe has. What made no file is said with its error. Of Whisper they quantize encoder and decoder.

`ours` is what the recipe ships. Each line has the task's first metric on the test split, the points that ours is better
by with a paired 95% interval, how often the answer is fp32's, how many times as fast as that file ours is, and how many
of the operators with stored weights ONNX Runtime computes on integers. EfficientNet's test split is 20 photographs, so
its answers are also compared with fp32's on the 500 pictures of `sample:objects` that nobody calibrated with: animals,
plants, food and things cut out on white, half of them shown twice, whole and nearer. They are no photographs of
ImageNet: fp32's own confidence in them is 0.39 in the median, so that many answers lie near a border.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from peers.int8_files import FLOAT, OURS, folder_name, write_files
from peers.int8_table import Line, Table, clear_outdated, load_table, save_table, show
from peers.int8_ways import PLAIN, SPEECH, Int8Comparison

from compress.benchmark.session import measure_side_by_side
from compress.cli.output import ConsoleProgress
from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.evaluation.evaluate import encode_for_model, predict
from compress.formats.onnx.model import find_graphs
from compress.formats.quiet_output import quiet_libraries
from compress.formats.runtime import get_runtime
from compress.formats.targets import TARGETS
from compress.inspection.integer_kernels import read_kernels
from compress.pipeline.runner import StageRunner
from compress.recipe.loading import read_recipe
from compress.recipe.policy import Margin
from compress.report.compare.effects import MeasurementPair, paired_change
from compress.results.metrics import describe_metric
from compress.results.report import Measurement
from compress.tasks.task import Examples
from compress.utils.errors import CompressError, InputError
from compress.utils.progress import Progress
from compress.utils.storage import size_bytes

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = (
    FOLDER / "minilm-int8.yaml",
    Path(__file__).parent / "embeddings-int8.yaml",
    FOLDER / "embeddings-small.yaml",
    FOLDER / "efficientnet-int8.yaml",
    FOLDER / "fashion-conv-qat.yaml",
    FOLDER / "fashion-vit-qat.yaml",
    FOLDER / "whisper-int8.yaml",
)
OTHERS = {"efficientnet-int8": DataConfig(splits={"train": "sample:objects/train", "test": "sample:objects/test"})}
"""Where the test split is small: examples without labels on which answers are compared with fp32's."""
CPU = TARGETS["cpu"]
__all__ = ["PLAIN", "main"]
WEIGHT_OF_SPEECH = 3
"""Recordings take longer than texts."""


def main(
    recipes: Annotated[list[Path] | None, typer.Argument(help="Recipes with quantize or qat; default: all.")] = None,
    artifacts: Annotated[Path, typer.Option(help="Cache and files.")] = Path("artifacts"),
    minutes: Annotated[float, typer.Option(help="Of timing, all models together; 0: nothing is timed.")] = 20.0,
    again: Annotated[bool, typer.Option(help="Take the files and verdicts that the last run left.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """Print a table for each model as it is done, and where ours is behind. Raises `CompressError`."""
    quiet_libraries()
    progress = ConsoleProgress()
    runners = [_runner(path, artifacts, progress) for path in recipes or RECIPES]
    if again:
        _check_judged(runners)
    shares = {runner.recipe.name: WEIGHT_OF_SPEECH if runner.inputs.task.name == SPEECH else 1 for runner in runners}
    tables: list[Table] = []
    for runner in runners:
        table = _judged(runner) if again else judge(runner)
        if minutes:
            table = time(runner, table, 60 * minutes * shares[runner.recipe.name] / sum(shares.values()))
        tables.append(table)
        show(table)
        if output is not None:
            output.write_text(json.dumps([asdict(table) for table in tables], indent=1) + "\n")


def judge(runner: StageRunner) -> Table:
    """Make every file, and compare its answers with ours and with fp32's; kept for later runs and for `--again`."""
    runner.run_all()
    clear_outdated(_folder(runner), _made_of(runner))
    if (recorded := load_table(_folder(runner))) is not None:
        runner.progress.note(f"{runner.recipe.name}: judged before")
        return recorded
    files, notes = write_files(Int8Comparison(runner).makers(), _folder(runner), runner.progress)
    rows = runner.inputs.data.split("test")
    examples = encode_for_model(files[FLOAT], runner.inputs.task, rows, runner.recipe.data.max_length)
    threads = runner.recipe.benchmark.threads
    answers = {
        name: predict(file, runner.inputs.task, examples, CPU, threads, runner.progress, name)
        for name, file in files.items()
    }
    first = {
        name: runner.inputs.task.measure(prediction.kept, prediction.labels, name, CPU.name)[0]
        for name, prediction in answers.items()
    }
    same = {
        name: runner.inputs.task.compare(prediction.kept, answers[FLOAT].kept, name, CPU.name)[0].value
        for name, prediction in answers.items()
    }
    if runner.recipe.name in OTHERS:
        same = _same_elsewhere(runner, files)
    lines = [
        Line(name, first[name].value, *_better(first[OURS], first[name]), same[name], size_bytes(file), _kernels(file))
        for name, file in files.items()
    ]
    table = Table(runner.recipe.name, first[OURS].metric, lines, notes)
    save_table(table, _folder(runner))
    return table


def time(runner: StageRunner, table: Table, seconds: float) -> Table:
    """The same lines with latencies, all files in one session of ``seconds``; kept in place of the table before."""
    runner.progress.note(f"{runner.recipe.name}: timing for {seconds:.0f} s")
    examples = _timed_rows(runner)
    files = {line.name: _place(runner, line.name) for line in table.lines}
    settings = runner.recipe.benchmark.model_copy(update={"budget_seconds": seconds, "batched": False})
    shared = dict.fromkeys(files, examples)
    timed = measure_side_by_side(files, shared, CPU, settings, OURS, runner.progress, runner.recipe.seed)
    rows = {(row.model, row.metric): row for row in timed.measurements}
    lines = []
    for line in table.lines:
        if (latency := rows.get((line.name, "latency_ms"))) is not None:
            line = replace(line, latency_ms=latency.value, **_ratio(rows[line.name, "speedup"]))
        lines.append(line)
    table = replace(table, lines=lines, timing_notes=list(timed.notes))
    save_table(table, _folder(runner))
    return table


def _runner(path: Path, artifacts: Path, progress: Progress) -> StageRunner:
    return StageRunner(read_recipe(path), path.parent, artifacts, progress)


def _folder(runner: StageRunner) -> Path:
    return runner.artifacts / "benchmarks" / runner.recipe.name


def _place(runner: StageRunner, name: str) -> Path:
    return _folder(runner) / folder_name(name)


def _made_of(runner: StageRunner) -> str:
    """What the files depend on: the stages, and the packages of whoever else quantizes."""
    packages = (f"{name} {version(name)}" for name in ("onnxruntime", "nncf", "torch"))
    return "\n".join([runner.results[runner.recipe.labels()[-1]].entry.key, *packages])


def _check_judged(runners: Sequence[StageRunner]) -> None:
    """Before anything is timed. Raises `InputError`."""
    missing = [runner.recipe.name for runner in runners if load_table(_folder(runner)) is None]
    if missing:
        raise InputError(
            f"--again, but these were not judged yet: {', '.join(missing)}.",
            where=str(_folder(runners[0]).parent),
            expected="the table that a run without --again keeps there for each recipe",
            hint="the same command without --again and with `--minutes 0`, or name only recipes that were judged",
        )


def _judged(runner: StageRunner) -> Table:
    table = load_table(_folder(runner))
    assert table is not None, "checked before"
    return table


def _timed_rows(runner: StageRunner) -> Examples:
    rows = runner.inputs.data.split("test").slice(0, runner.recipe.benchmark.examples)
    return encode_for_model(_place(runner, FLOAT), runner.inputs.task, rows, runner.recipe.data.max_length)


def _better(ours: Measurement, other: Measurement) -> tuple[float, float, float]:
    """By what share ours is better, with its interval."""
    if ours.model == other.model:
        return 0.0, 0.0, 0.0
    change = paired_change(MeasurementPair(other, ours, Margin(0.0, relative=False)), confidence=0.95)
    if describe_metric(ours.metric, ours.unit).better == "higher":
        return change.effect, change.low, change.high
    return -change.effect, -change.high, -change.low


def _same_elsewhere(runner: StageRunner, made: Mapping[str, Path]) -> dict[str, float]:
    """On how many of other examples each file's likeliest class is fp32's; one by one, as at batch 1."""
    columns = tuple(column for column in runner.inputs.task.columns if not column.label)
    rows = load_dataset(OTHERS[runner.recipe.name], columns, Path(), runner.progress).split("test")
    examples = encode_for_model(made[FLOAT], runner.inputs.task, rows, runner.recipe.data.max_length)
    predicted_classes = {}
    for name, file in made.items():
        session = get_runtime(CPU.runtime).open(file, CPU, runner.recipe.benchmark.threads)
        logits = (session.predict(examples.batch([row]))["logits"][0] for row in range(len(examples)))
        predicted_classes[name] = np.array([row_logits.argmax() for row_logits in logits])
    return {name: float((classes == predicted_classes[FLOAT]).mean()) for name, classes in predicted_classes.items()}


def _kernels(place: Path) -> str:
    kernels = [kernel for graph in find_graphs(place) for kernel in read_kernels(graph)]
    return f"{sum(kernel.integer for kernel in kernels)} of {len(kernels)} kernels"


def _ratio(speedup: Measurement) -> dict[str, float | None]:
    """How many times as fast ours is, from the file's own speed-up over ours."""
    low, high = speedup.low, speedup.high
    return {"faster": 1 / speedup.value, "faster_low": high and 1 / high, "faster_high": low and 1 / low}


if __name__ == "__main__":
    try:
        typer.run(main)
    except CompressError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
