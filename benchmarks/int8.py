"""Compare INT8 models of our recipes with those of other quantizers' defaults: accuracy, size and speed at batch 1.

    python benchmarks/int8.py                                       # every model; about an hour on two idle cores
    python benchmarks/int8.py recipes/minilm-int8.yaml --minutes 4 --output int8.json
    python benchmarks/int8.py --minutes 0                           # creates and evaluates the files without timing
    python benchmarks/int8.py --again --minutes 8                   # times the files of an earlier run

Files, evaluations and timings are stored below `ARTIFACTS/benchmarks`, so that a repeated command resumes an
interrupted one. Files of changed recipes are created again.

The stages of a recipe are run or read from the cache. ONNX Runtime (`quantize_dynamic`, `quantize_static`) and NNCF
(`onnx_int8`) quantize its float graph with their defaults and the recipe's calibration examples. They also quantize the
exporter's unmodified graph if it differs. For Whisper they quantize encoder and decoder. Errors are printed.

`ours` is the final model of the recipe. Each line has the task's first metric on the test split, our advantage in
points with a paired 95% interval, the share of predictions equal to fp32's, our speed-up over the file, and the number
of operators with stored weights that ONNX Runtime computes on integers.

EfficientNet's test split has only 20 photographs, so predictions are also compared with fp32's on the 500 images of
`sample:objects`, which are not used for calibration: animals, plants, food and objects cut out on white, half of them
shown twice, whole and magnified. They differ from ImageNet photographs: the median confidence of fp32 is 0.39, so many
predictions are close to a decision boundary.
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
from compress.report.progress import ConsoleProgress
from compress.results.metrics import describe_metric
from compress.results.report import Measurement
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
EXTRA_EXAMPLES = {
    "efficientnet-int8": DataConfig(splits={"train": "sample:objects/train", "test": "sample:objects/test"}),
}
"""Examples without labels on which predictions are compared with fp32's, for recipes with a small test split."""
CPU = TARGETS["cpu"]
__all__ = ["PLAIN", "main"]
SPEECH_TIME_SHARE = 3
"""Weight of speech models in the timing budget; that of others is 1, since recordings take longer than texts."""


def main(
    recipes: Annotated[list[Path] | None, typer.Argument(help="Recipes with quantize or qat; default: all.")] = None,
    artifacts: Annotated[Path, typer.Option(help="Folder of the cache and of the files.")] = Path("artifacts"),
    minutes: Annotated[float, typer.Option(help="Timing budget of all models; 0: no timing.")] = 20.0,
    again: Annotated[bool, typer.Option(help="Use the files and evaluations of an earlier run.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """Print a table for each model, and the files that are better than ours. Raises `CompressError`."""
    quiet_libraries()
    progress = ConsoleProgress()
    runners = [_runner(path, artifacts, progress) for path in recipes or RECIPES]
    if again:
        _check_evaluated(runners)
    shares = {runner.recipe.name: SPEECH_TIME_SHARE if runner.inputs.task.name == SPEECH else 1 for runner in runners}
    tables: list[Table] = []
    for runner in runners:
        table = load_table(_folder(runner)) if again else None
        table = table or evaluate(runner)
        if minutes:
            table = time(runner, table, 60 * minutes * shares[runner.recipe.name] / sum(shares.values()))
        tables.append(table)
        show(table)
        if output is not None:
            output.write_text(json.dumps([asdict(table) for table in tables], indent=1) + "\n")


def evaluate(runner: StageRunner) -> Table:
    """Create every file, compare its predictions with ours and with fp32's, and store the table for later runs."""
    runner.run_all()
    clear_outdated(_folder(runner), _files_key(runner))
    if (stored := load_table(_folder(runner))) is not None:
        runner.progress.note(f"{runner.recipe.name}: evaluated earlier")
        return stored
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
    if runner.recipe.name in EXTRA_EXAMPLES:
        same = _agreement_on_extra_examples(runner, files)
    ours = first[OURS]
    lines = [
        Line(
            name, first[name].value, *_advantage(first[OURS], first[name]), same[name], size_bytes(file), _kernels(file)
        )
        for name, file in files.items()
    ]
    table = Table(runner.recipe.name, ours.metric, lines, notes)
    save_table(table, _folder(runner))
    return table


def time(runner: StageRunner, table: Table, seconds: float) -> Table:
    """Add latencies to a table, measured interleaved in one session of ``seconds``, and store it."""
    runner.progress.note(f"{runner.recipe.name}: timing for {seconds:.0f} s")
    rows = runner.inputs.data.split("test").slice(0, runner.recipe.benchmark.examples)
    files = {line.name: _folder(runner) / folder_name(line.name) for line in table.lines}
    examples = encode_for_model(files[FLOAT], runner.inputs.task, rows, runner.recipe.data.max_length)
    settings = runner.recipe.benchmark.model_copy(update={"budget_seconds": seconds, "batched": False})
    shared = dict.fromkeys(files, examples)
    timed = measure_side_by_side(files, shared, CPU, settings, OURS, runner.progress, runner.recipe.seed)
    measurements = {(row.model, row.metric): row for row in timed.measurements}
    lines = []
    for line in table.lines:
        if (latency := measurements.get((line.name, "latency_ms"))) is not None:
            line = replace(line, latency_ms=latency.value, **_speedup_of_ours(measurements[line.name, "speedup"]))
        lines.append(line)
    table = replace(table, lines=lines, timing_notes=list(timed.notes))
    save_table(table, _folder(runner))
    return table


def _runner(path: Path, artifacts: Path, progress: Progress) -> StageRunner:
    return StageRunner(read_recipe(path), path.parent, artifacts, progress)


def _folder(runner: StageRunner) -> Path:
    return runner.artifacts / "benchmarks" / runner.recipe.name


def _files_key(runner: StageRunner) -> str:
    """Return what the files depend on: the stages and the versions of the other quantizers."""
    packages = (f"{name} {version(name)}" for name in ("onnxruntime", "nncf", "torch"))
    return "\n".join([runner.results[runner.recipe.labels()[-1]].entry.key, *packages])


def _check_evaluated(runners: Sequence[StageRunner]) -> None:
    """Raise `InputError` unless every recipe has been evaluated."""
    missing = [runner.recipe.name for runner in runners if load_table(_folder(runner)) is None]
    if missing:
        raise InputError(
            f"--again, but these have not been evaluated: {', '.join(missing)}.",
            where=str(_folder(runners[0]).parent),
            expected="the table that a run without --again stores there for each recipe",
            hint="run the command without --again and with `--minutes 0`, or specify only evaluated recipes",
        )


def _advantage(ours: Measurement, other: Measurement) -> tuple[float, float, float]:
    """Return by what share ours is better, with its interval."""
    if ours.model == other.model:
        return 0.0, 0.0, 0.0
    change = paired_change(MeasurementPair(other, ours, Margin(0.0, relative=False)), confidence=0.95)
    if describe_metric(ours.metric, ours.unit).better == "higher":
        return change.effect, change.low, change.high
    return -change.effect, -change.high, -change.low


def _agreement_on_extra_examples(runner: StageRunner, files: Mapping[str, Path]) -> dict[str, float]:
    """Return the share of extra examples on which each file predicts fp32's class, at batch 1."""
    columns = tuple(column for column in runner.inputs.task.columns if not column.label)
    rows = load_dataset(EXTRA_EXAMPLES[runner.recipe.name], columns, Path(), runner.progress).split("test")
    examples = encode_for_model(files[FLOAT], runner.inputs.task, rows, runner.recipe.data.max_length)
    predicted_classes = {}
    for name, file in files.items():
        session = get_runtime(CPU.runtime).open(file, CPU, runner.recipe.benchmark.threads)
        logits = (session.predict(examples.batch([row]))["logits"][0] for row in range(len(examples)))
        predicted_classes[name] = np.array([row_logits.argmax() for row_logits in logits])
    return {name: float((classes == predicted_classes[FLOAT]).mean()) for name, classes in predicted_classes.items()}


def _kernels(model: Path) -> str:
    kernels = [kernel for graph in find_graphs(model) for kernel in read_kernels(graph)]
    return f"{sum(kernel.integer for kernel in kernels)} of {len(kernels)} kernels"


def _speedup_of_ours(speedup: Measurement) -> dict[str, float | None]:
    """Return our speed-up over a file, from the file's speed-up over ours."""
    low, high = speedup.low, speedup.high
    return {"faster": 1 / speedup.value, "faster_low": high and 1 / high, "faster_high": low and 1 / low}


if __name__ == "__main__":
    try:
        typer.run(main)
    except CompressError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
