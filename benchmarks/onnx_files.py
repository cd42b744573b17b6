"""Twenty ONNX files that other people's packages ship, quantized by compress and by ONNX Runtime's own quantizer.

    python benchmarks/onnx_files.py                            # all files: 20 minutes on one core, 230 MB download
    python benchmarks/onnx_files.py ppocr-cls wake-word        # some of them
    python benchmarks/onnx_files.py --write                    # replace benchmarks/results/onnx-files.json
    python benchmarks/onnx_files.py --write ppocr-cls          # replace one of its rows

Each file is the `model` of a recipe with one stage: static INT8 for convolutional models, dynamic INT8 for models that
only have matrix products, or whose layers lie in branches or behind a power spectrum. Inputs are parts of photographs
(`sample:imagenet-20`, some with lines of text), speech (`sample:prompts-audio`) or Python source files, in the shapes
that the file's package uses: 32 for calibration and 32 others for evaluation, fewer for the largest models. No labels
are used: the outputs are compared with those of the original file.

The reference quantizer is ONNX Runtime's `quantize_static` (QDQ, per channel, min-max, the same inputs) or
`quantize_dynamic` (per channel). A file passes if the RMS difference of its worst output is at most 10% of that
output's standard deviation: rounding to 8 bits has an error of about 0.5%, and 50 to 100 consecutive layers add up to
ten times that. A more sensitive graph passes if its error is at most ONNX Runtime's and at most 20%.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from foreign.calls import write_calls
from foreign.files import FILES, PACKAGES, ForeignFile, fetch_file

from compress.data.dataset import Dataset, load_dataset
from compress.formats.onnx.import_onnx import ImportedGraph, import_graph
from compress.formats.onnx.int8.observers import open_session
from compress.formats.onnx.model import FLOAT_GRAPH, OnnxModel, find_graph
from compress.formats.quiet_output import quiet_libraries, suppress_output
from compress.models.graph_inputs import GRAPH_INPUTS
from compress.models.model import TorchModel
from compress.models.processor import processor_of
from compress.numerics.output_agreement import output_agreement
from compress.pipeline.run import run
from compress.recipe.recipe import Recipe
from compress.report.progress import ConsoleProgress
from compress.results.report import Report
from compress.stages.base import Context
from compress.tasks.registry import TASKS
from compress.tasks.task import CollectedOutputs, Task
from compress.tasks.tokens import keep_all
from compress.utils.errors import CompressError, first_line
from compress.utils.progress import Progress, SilentProgress

BOUND = 0.1
RESULTS = Path(__file__).parent / "results" / "onnx-files.json"
_CEILING = {"error_ceiling": 0.05, "damage_examples": 16}
"""The most sensitive layers stay in float, as few as reduce the error on calibration inputs below this."""


@dataclass(frozen=True)
class Row:
    """Result of one file.

    Errors are the RMS difference of the worst output divided by its standard deviation; ``speedup`` has its interval.
    """

    name: str
    method: str
    error: float
    reference_error: float | None
    cosine: float
    agreement: float
    bytes_before: int
    bytes_after: int
    reference_bytes: int | None
    speedup: tuple[float, float, float] | None
    right: bool
    seconds: float
    why: str = ""


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Names of files. Default: all.")] = None,
    write: Annotated[bool, typer.Option(help="Write the results, of these files only.")] = False,
    seconds: Annotated[float, typer.Option(help="Time budget of the benchmark for each model. 0: none.")] = 2.0,
    output: Annotated[Path | None, typer.Option(help="File for all rows as JSON.")] = None,
) -> None:
    """Quantize, evaluate and time each file."""
    quiet_libraries()
    progress = ConsoleProgress()
    chosen = [file for file in FILES if not names or file.name in names]
    rows = []
    for file in chosen:
        rows.append(_row(file, seconds, progress))
        if write:  # after each file, so that an interrupted run keeps its rows
            RESULTS.write_text(json.dumps(_results(rows, keep_others=bool(names)), indent=1) + "\n")
    typer.echo(_table(rows))
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.exit(0 if all(row.right for row in rows) else 1)


def _row(file: ForeignFile, seconds: float, progress: Progress) -> Row:
    began = time.perf_counter()
    model_path = fetch_file(file, progress)
    start = import_graph(model_path)
    method = file.method or ("static" if _has_convolutions(start.graph) else "dynamic")
    with tempfile.TemporaryDirectory(prefix="onnx-files-") as name:
        folder = Path(name)
        write_calls(file, start.inputs, folder / "calls", file.calls, file.calls)
        shutil.copy(model_path, folder / "theirs.onnx")
        reference_error, reference_bytes = _quantize_with_onnxruntime(start, method, folder)
        try:
            values, size, speedup = _quantize(file, method, start, folder, seconds)
        except CompressError as error:
            progress.note(f"{file.name}: {error}")
            sizes = model_path.stat().st_size, 0, reference_bytes
            return Row(file.name, method, np.nan, reference_error, 0, 0, *sizes, None, False, 0.0, str(error))
        error = values["rms_error"]
        row = Row(
            *(file.name, method, error, reference_error, values["output_cosine"], values["agreement"]),
            *(model_path.stat().st_size, size, reference_bytes, speedup),
            right=error <= BOUND or error <= min(reference_error or 0.0, 2 * BOUND),
            seconds=time.perf_counter() - began,
            why="; ".join(start.changes),
        )
    progress.note(
        f"{row.name}: {row.method}, error {row.error:.3f} (ONNX Runtime {row.reference_error}), {_ratio(row)}"
    )
    return row


def _quantize(
    file: ForeignFile, method: str, start: ImportedGraph, folder: Path, seconds: float
) -> tuple[dict[str, float], int, tuple[float, float, float] | None]:
    """Return the metrics, the bytes of the file and the speed-up; run only the stage if ``seconds`` is 0."""
    recipe = _recipe(file, method, seconds or 1.0)
    if seconds:
        done = run(recipe, folder, folder / "artifacts", SilentProgress())
        rows = [row for row in done.report.measurements if row.model == "final" and row.target == "cpu"]
        metrics = {row.metric: row.value for row in rows}
        return metrics, find_graph(done.folder / "model").stat().st_size, _speedup(done.report)
    task = TASKS[recipe.task]
    data = load_dataset(recipe.data, task.columns, folder, SilentProgress())
    companions = {GRAPH_INPUTS: start.inputs.as_json(), "config.json": b"{}"}
    model = OnnxModel(start.graph, FLOAT_GRAPH, companions)
    context = Context(task, data, 0, recipe.seed, SilentProgress(), _no_earlier_model, Path, folder)
    imported = recipe.stages[0].run(model, context)
    outputs = [_collect_outputs(task, graph, data, model) for graph in (imported.graph, start.graph)]
    rows = task.compare(outputs[0], outputs[1], "final", "cpu")
    return {row.metric: row.value for row in rows}, imported.graph.ByteSize(), None


def _no_earlier_model(label: str) -> TorchModel:
    raise KeyError(label)


def _collect_outputs(task: Task, graph: onnx.ModelProto, data: Dataset, model: OnnxModel) -> CollectedOutputs:
    """Return what the task collects of the outputs of a graph on the test inputs."""
    examples = task.encode(data.split("test"), processor_of(model), None, 0)
    session = open_session(graph)
    names = [output.name for output in session.get_outputs()]
    input_names = {entry.name for entry in session.get_inputs()}

    def predict(indices: list[int]) -> dict[str, np.ndarray]:
        batch = {name: array for name, array in examples.batch(indices).items() if name in input_names}
        return dict(zip(names, session.run(None, batch), strict=True))

    return keep_all(task, examples, [[row] for row in range(len(examples))], predict)


def _recipe(file: ForeignFile, method: str, seconds: float) -> Recipe:
    static = {"method": "static", "calibration_examples": file.calls}
    return Recipe.model_validate(
        {
            "name": file.name,
            "task": "graph-agreement",
            "model": "theirs.onnx",
            "data": {"source": "calls", "splits": {"train": "train", "test": "test"}, "drop_overlap": True},
            "stages": [{"onnx_int8": {**_CEILING, **(static if method == "static" else {})}}],
            "benchmark": {"threads": 1, "seconds": seconds, "launches": 3, "examples": 16},
        }
    )


def _has_convolutions(graph: onnx.ModelProto) -> bool:
    stored = {tensor.name for tensor in graph.graph.initializer}
    return any(node.op_type == "Conv" and node.input[1] in stored for node in graph.graph.node)


def _calls(folder: Path) -> list[dict[str, np.ndarray]]:
    calls = []
    for path in sorted(folder.iterdir()):
        with np.load(path) as arrays:
            calls.append({name: arrays[name] for name in arrays.files})
    return calls


def _quantize_with_onnxruntime(start: ImportedGraph, method: str, folder: Path) -> tuple[float | None, int | None]:
    """Return error and bytes of the same graph quantized by ONNX Runtime, or None if its quantizer fails."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._calls = iter(_calls(folder / "calls" / "train"))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._calls, None)

    source, reference = folder / "float.onnx", folder / "oracle.onnx"
    onnx.save_model(start.graph, source)
    try:
        with suppress_output("process"):
            if method == "static":
                quantize_static(source, reference, Reader(), per_channel=True)
            else:
                quantize_dynamic(source, reference, per_channel=True)
            graph = onnx.load(reference)
            exact, rounded = open_session(start.graph), open_session(graph)
            calls = _calls(folder / "calls" / "test")
            output_pairs = [(exact.run(None, call), rounded.run(None, call)) for call in calls]
    except Exception as error:  # noqa: BLE001 - any error of the other tool is reported
        typer.echo(f"  ONNX Runtime's quantizer: {first_line(error)}", err=True)
        return None, None
    errors = []
    for index, output in enumerate(output_pairs[0][0]):
        if output.dtype.kind == "f":
            expected, given = (np.stack([pair[side][index].reshape(-1) for pair in output_pairs]) for side in (0, 1))
            errors.append(output_agreement(expected, given).rms)
    return max(errors), reference.stat().st_size


def _speedup(report: Report) -> tuple[float, float, float] | None:
    row = next((row for row in report.measurements if (row.metric, row.model) == ("speedup", "final")), None)
    return None if row is None else (row.value, row.low or row.value, row.high or row.value)


def _ratio(row: Row) -> str:
    return f"{row.bytes_before / max(row.bytes_after, 1):.2f}x smaller, {_speedup_cell(row, 'not timed')}"


def _speedup_cell(row: Row, missing: str) -> str:
    if row.speedup is None:
        return missing
    return f"{row.speedup[0]:.2f}x ({row.speedup[1]:.2f}-{row.speedup[2]:.2f})"


_COLUMNS = ["file", "INT8", "error", "ONNX Runtime's", "cosine", "smaller", "ONNX Runtime's", "faster", "right"]


def _cells(row: Row) -> list[str]:
    smaller = row.bytes_before / max(row.bytes_after, 1)
    theirs = "-" if row.reference_bytes is None else f"{row.bytes_before / row.reference_bytes:.2f}x"
    reference = "fails" if row.reference_error is None else f"{row.reference_error:.2%}"
    return [row.name, row.method, f"{row.error:.2%}", reference, f"{row.cosine:.4f}", f"{smaller:.2f}x", theirs,
            _speedup_cell(row, "-"), "yes" if row.right else "no"]  # fmt: skip


def _table(rows: list[Row]) -> str:
    lines = [_COLUMNS, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*shown, f"{sum(row.right for row in rows)} of {len(rows)} right"])


def _results(rows: list[Row], keep_others: bool) -> dict[str, object]:
    """Return the content of the results file: ``rows``, and with ``keep_others`` the recorded rows of other files."""
    from compress.utils.environment import environment

    this_environment = environment()
    cells_by_name = {row.name: _cells(row) for row in rows}
    if keep_others and RESULTS.is_file():
        recorded_rows = json.loads(RESULTS.read_text())["tables"][0]["rows"]
        cells_by_name = {cells[0]: cells for cells in recorded_rows} | cells_by_name
    cells = [cells_by_name[file.name] for file in FILES if file.name in cells_by_name]
    right = sum(row[-1] == "yes" for row in cells)
    what = {file.name: (file.description, PACKAGES[file.package].requirement, file.licence) for file in FILES}
    return {
        "title": "Other people's ONNX files",
        "order": 9,
        "command": "python benchmarks/onnx_files.py --write",
        "machine": f"one thread of {this_environment['processor']}, other processes running",
        "measured": time.strftime("%Y-%m-%d"),
        "tables": [
            {
                "title": f"{right} of {len(cells)} right in INT8, against the original file",
                "columns": _COLUMNS,
                "rows": cells,
                "notes": [
                    "error: RMS difference of the worst output divided by its standard deviation, on inputs not used "
                    "for calibration; right: at most 10%, or up to 20% if ONNX Runtime's quantizer is no better",
                    f"compress keeps layers in float until the error on calibration inputs is at most "
                    f"{_CEILING['error_ceiling']:.0%} (`error_ceiling`); ONNX Runtime's quantizer has no such setting",
                    *(f"{name}: {words}; {package}, {licence}." for name, (words, package, licence) in what.items()
                      if name in cells_by_name),
                ],
            }
        ],
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
