"""Twenty ONNX files that other people's packages ship, quantized by compress and by ONNX Runtime's own quantizer.

    python benchmarks/onnx_files.py                            # all, some 20 minutes on one core; 230 MB are fetched
    python benchmarks/onnx_files.py ppocr-cls wake-word        # some of them
    python benchmarks/onnx_files.py --write                    # benchmarks/results/onnx-files.json anew
    python benchmarks/onnx_files.py --write ppocr-cls          # one of its rows

Each file is the `model` of a recipe of one stage: static INT8 where it has convolutions that compute on what goes in,
dynamic where it has products alone, or where all that it has lies in branches or behind a power spectrum. Calls are
parts of photographs (`sample:imagenet-20`, with lines of text on some), speech (`sample:prompts-audio`) or Python's own
files, in shapes that the package of the file gives it; 32 to calibrate with, 32 others to judge by, fewer of the
largest. Nobody's labels are read: what is measured is how near the outputs stay to the original's.

ONNX Runtime's `quantize_static` (QDQ, per channel, min-max, the same calls) or `quantize_dynamic` (per channel) is the
oracle. A file is right if the RMS difference of its worst output is at most a tenth of that output's standard
deviation: rounding a signal to 8 bits leaves about half a hundredth, and some fifty to a hundred layers in a row add up
to ten times that. A graph that is more sensitive than this is so in the oracle too: then it is right if it is no
further off than the oracle, up to a fifth.
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
from foreign.files import FILES, PACKAGES, ForeignFile, fetched

from compress.cli.output import ConsoleProgress
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
from compress.results.report import Report
from compress.stages.base import Context
from compress.tasks.registry import get_task
from compress.tasks.task import CollectedOutputs, Task
from compress.tasks.tokens import keep_all
from compress.utils.errors import CompressError, first_line
from compress.utils.progress import Progress, SilentProgress

BOUND = 0.1
RESULTS = Path(__file__).parent / "results" / "onnx-files.json"
_CEILING = {"error_ceiling": 0.05, "damage_examples": 16}
"""Layers that do most damage stay in float, as few as bring the error on calibration calls below this."""


@dataclass(frozen=True)
class Row:
    """What came of one file. Errors are RMS differences over spread, of the worst output; ``speedup`` with its ends."""

    name: str
    way: str
    error: float
    oracle_error: float | None
    cosine: float
    agreement: float
    bytes_before: int
    bytes_after: int
    oracle_bytes: int | None
    speedup: tuple[float, float, float] | None
    right: bool
    seconds: float
    why: str = ""


def main(
    names: Annotated[list[str] | None, typer.Argument(help="of the files; all where none is named")] = None,
    write: Annotated[bool, typer.Option(help="write the results anew, of the files named alone")] = False,
    seconds: Annotated[float, typer.Option(help="time budget for each model of a bench; 0 for none")] = 2.0,
    output: Annotated[Path | None, typer.Option(help="every row as JSON too")] = None,
) -> None:
    """Quantize, judge and time each file."""
    quiet_libraries()
    progress = ConsoleProgress()
    chosen = [file for file in FILES if not names or file.name in names]
    rows = []
    for file in chosen:
        rows.append(_row(file, seconds, progress))
        if write:  # each as it comes, so that what is stopped keeps the others
            RESULTS.write_text(json.dumps(_results(rows, kept=bool(names)), indent=1) + "\n")
    typer.echo(_table(rows))
    if output is not None:
        output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    sys.exit(0 if all(row.right for row in rows) else 1)


def _row(file: ForeignFile, seconds: float, progress: Progress) -> Row:
    began = time.perf_counter()
    model_path = fetched(file, progress)
    start = import_graph(model_path)
    way = file.way or ("static" if _has_convolutions(start.graph) else "dynamic")
    with tempfile.TemporaryDirectory(prefix="onnx-files-") as name:
        folder = Path(name)
        write_calls(file, start.inputs, folder / "calls", file.calls, file.calls)
        shutil.copy(model_path, folder / "theirs.onnx")
        oracle_error, oracle_bytes = _oracle(start, way, folder)
        try:
            values, size, speedup = _made(file, way, start, folder, seconds)
        except CompressError as error:
            progress.note(f"{file.name}: {error}")
            sizes = model_path.stat().st_size, 0, oracle_bytes
            return Row(file.name, way, np.nan, oracle_error, 0, 0, *sizes, None, False, 0.0, str(error))
        error = values["rms_error"]
        row = Row(
            *(file.name, way, error, oracle_error, values["output_cosine"], values["agreement"]),
            *(model_path.stat().st_size, size, oracle_bytes, speedup),
            right=error <= BOUND or error <= min(oracle_error or 0.0, 2 * BOUND),
            seconds=time.perf_counter() - began,
            why="; ".join(start.changes),
        )
    progress.note(f"{row.name}: {row.way}, error {row.error:.3f} (oracle {row.oracle_error}), {_ratio(row)}")
    return row


def _made(
    file: ForeignFile, way: str, start: ImportedGraph, folder: Path, seconds: float
) -> tuple[dict[str, float], int, tuple[float, float, float] | None]:
    """What is measured, the file's bytes and how much faster it is; without ``seconds`` the stage alone is run."""
    recipe = _recipe(file, way, seconds or 1.0)
    if seconds:
        done = run(recipe, folder, folder / "artifacts", SilentProgress())
        return _values(done.report), find_graph(done.folder / "model").stat().st_size, _speedup(done.report)
    task = get_task(recipe.task)
    data = load_dataset(recipe.data, task.columns, folder, SilentProgress())
    companions = {GRAPH_INPUTS: start.inputs.as_json(), "config.json": b"{}"}
    model = OnnxModel(start.graph, FLOAT_GRAPH, companions)
    context = Context(task, data, 0, recipe.seed, SilentProgress(), _no_other, Path, folder)
    imported = recipe.stages[0].run(model, context)
    outputs = [_kept(task, graph, data, model) for graph in (imported.graph, start.graph)]
    rows = task.compare(outputs[0], outputs[1], "final", "cpu")
    return {row.metric: row.value for row in rows}, imported.graph.ByteSize(), None


def _no_other(label: str) -> TorchModel:
    raise KeyError(label)


def _kept(task: Task, graph: onnx.ModelProto, data: Dataset, model: OnnxModel) -> CollectedOutputs:
    """What the task keeps of a graph's answers to the test calls."""
    examples = task.encode(data.split("test"), processor_of(model), None, 0)
    session = open_session(graph)
    names = [output.name for output in session.get_outputs()]
    taken = {entry.name for entry in session.get_inputs()}

    def answered(places: list[int]) -> dict[str, np.ndarray]:
        batch = {name: array for name, array in examples.batch(places).items() if name in taken}
        return dict(zip(names, session.run(None, batch), strict=True))

    return keep_all(task, examples, [[row] for row in range(len(examples))], answered)


def _recipe(file: ForeignFile, way: str, seconds: float) -> Recipe:
    static = {"method": "static", "calibration_examples": file.calls}
    return Recipe.model_validate(
        {
            "name": file.name,
            "task": "graph-agreement",
            "model": "theirs.onnx",
            "data": {"source": "calls", "splits": {"train": "train", "test": "test"}, "drop_overlap": True},
            "stages": [{"onnx_int8": {**_CEILING, **(static if way == "static" else {})}}],
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


def _oracle(start: ImportedGraph, way: str, folder: Path) -> tuple[float | None, int | None]:
    """Error and bytes of what ONNX Runtime's own quantizer makes of the same graph and calls; None where it fails."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._calls = iter(_calls(folder / "calls" / "train"))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._calls, None)

    source, oracle = folder / "float.onnx", folder / "oracle.onnx"
    onnx.save_model(start.graph, source)
    try:
        with suppress_output("process"):
            if way == "static":
                quantize_static(source, oracle, Reader(), per_channel=True)
            else:
                quantize_dynamic(source, oracle, per_channel=True)
            graph = onnx.load(oracle)
            exact, rounded = open_session(start.graph), open_session(graph)
            calls = _calls(folder / "calls" / "test")
            run_session = [(exact.run(None, call), rounded.run(None, call)) for call in calls]
    except Exception as error:  # noqa: BLE001 - whatever another tool raises is what is told of it
        typer.echo(f"  ONNX Runtime's quantizer: {first_line(error)}", err=True)
        return None, None
    errors = []
    for index, output in enumerate(run_session[0][0]):
        if output.dtype.kind == "f":
            expected, given = (np.stack([pair[side][index].reshape(-1) for pair in run_session]) for side in (0, 1))
            errors.append(output_agreement(expected, given).rms)
    return max(errors), oracle.stat().st_size


def _values(report: Report) -> dict[str, float]:
    return {row.metric: row.value for row in report.measurements if row.model == "final" and row.target == "cpu"}


def _speedup(report: Report) -> tuple[float, float, float] | None:
    speedup_row = next((row for row in report.measurements if (row.metric, row.model) == ("speedup", "final")), None)
    return (
        None
        if speedup_row is None
        else (speedup_row.value, speedup_row.low or speedup_row.value, speedup_row.high or speedup_row.value)
    )


def _ratio(row: Row) -> str:
    faster = (
        "not timed" if row.speedup is None else f"{row.speedup[0]:.2f}x ({row.speedup[1]:.2f}-{row.speedup[2]:.2f})"
    )
    return f"{row.bytes_before / max(row.bytes_after, 1):.2f}x smaller, {faster}"


_COLUMNS = ["file", "INT8", "error", "ONNX Runtime's", "cosine", "smaller", "ONNX Runtime's", "faster", "right"]


def _cells(row: Row) -> list[str]:
    smaller = row.bytes_before / max(row.bytes_after, 1)
    theirs = "-" if row.oracle_bytes is None else f"{row.bytes_before / row.oracle_bytes:.2f}x"
    faster = "-" if row.speedup is None else f"{row.speedup[0]:.2f}x ({row.speedup[1]:.2f}-{row.speedup[2]:.2f})"
    oracle = "fails" if row.oracle_error is None else f"{row.oracle_error:.2%}"
    return [row.name, row.way, f"{row.error:.2%}", oracle, f"{row.cosine:.4f}", f"{smaller:.2f}x", theirs, faster,
            "yes" if row.right else "no"]  # fmt: skip


def _table(rows: list[Row]) -> str:
    lines = [_COLUMNS, *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_COLUMNS))]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*shown, f"{sum(row.right for row in rows)} of {len(rows)} right"])


def _results(rows: list[Row], kept: bool) -> dict[str, object]:
    """What is committed: ``rows``, and with ``kept`` those of other files as they were."""
    from compress.utils.environment import environment

    this_environment = environment()
    cells_by_name = {row.name: _cells(row) for row in rows}
    if kept and RESULTS.is_file():
        recorded_rows = json.loads(RESULTS.read_text())["tables"][0]["rows"]
        cells_by_name = {cells[0]: cells for cells in recorded_rows} | cells_by_name
    cells = [cells_by_name[file.name] for file in FILES if file.name in cells_by_name]
    right = sum(row[-1] == "yes" for row in cells)
    what = {file.name: (file.what, PACKAGES[file.package].requirement, file.licence) for file in FILES}
    return {
        "title": "Other people's ONNX files",
        "order": 9,
        "command": "python benchmarks/onnx_files.py --write",
        "machine": f"one thread of {this_environment['processor']}, beside other work",
        "measured": time.strftime("%Y-%m-%d"),
        "tables": [
            {
                "title": f"{right} of {len(cells)} right in INT8, against the file as it came",
                "columns": _COLUMNS,
                "rows": cells,
                "notes": [
                    "error: RMS difference of the worst output over its standard deviation, on calls that nobody "
                    "calibrated with; right: at most 10%, or up to 20% where ONNX Runtime's own quantizer is no nearer",
                    f"compress keeps layers in float until the error on calls that it saw is at most "
                    f"{_CEILING['error_ceiling']:.0%} (`error_ceiling`); ONNX Runtime's quantizer has no such choice",
                    *(f"{name}: {words}; {package}, {licence}." for name, (words, package, licence) in what.items()
                      if name in cells_by_name),
                ],
            }
        ],
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
