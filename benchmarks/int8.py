"""INT8 by everyone's defaults and by ours, on one model in one session: accuracy kept, speed at batch 1, size.

    python benchmarks/int8.py                                   # about 20 minutes on two idle cores
    python benchmarks/int8.py --recipe recipes/minilm-int8.yaml --seconds 8 --output int8.json

The recipe's stages up to its export are run (or taken from the cache), and everyone quantizes that float graph with the
same calibration examples. All files then answer the test split through ONNX Runtime and are timed in turns. `kernels`
says how many of the operators with stored weights run on integers. Speeds are against the fp32 graph that this project
exports, whose attention is fused already; `plain` is the exporter's own graph, also under ONNX Runtime's dynamic
quantizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import onnx
import typer
from peers.int8_defaults import nncf_default, onnxruntime_dynamic, onnxruntime_static
from peers.int8_files import FLOAT, speed_text, write_files

from compress.bench.session import measure_together
from compress.cli.console_progress import ConsoleProgress
from compress.evaluate import encode_for, predict
from compress.inspect.integer_kernels import read_kernels
from compress.models.model import size_bytes
from compress.models.onnx_export import export_onnx
from compress.models.onnx_model import OnnxModel, find_graph
from compress.models.onnx_quantization import quantize_embeddings, quantize_products
from compress.models.torch_model import TorchModel
from compress.pipeline.quiet import quiet_libraries
from compress.pipeline.road import Road
from compress.progress import Progress
from compress.quantization.int8_calibration import calibration_set
from compress.quantization.int8_config import Int8Options
from compress.quantization.int8_run import quantize_int8
from compress.recipe_source import read_recipe
from compress.stages.quantize import Quantize
from compress.targets import TARGETS

RECIPE = Path(__file__).parents[1] / "recipes" / "minilm-int8.yaml"


@dataclass(frozen=True)
class Line:
    """One file: accuracy and its share of fp32's, agreement with it, latency, speed-up with interval, and size."""

    name: str
    accuracy: float
    kept: float
    agreement: float
    latency_ms: float | None
    faster: float | None
    faster_low: float | None
    faster_high: float | None
    size_bytes: int
    smaller: float
    kernels: str


def main(
    recipe: Annotated[Path, typer.Option(help="Its stages up to the export make the float model.")] = RECIPE,
    artifacts: Annotated[Path, typer.Option(help="Cache and files.")] = Path("artifacts"),
    seconds: Annotated[float, typer.Option(help="Of timing, for each file.")] = 8.0,
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """Print the table."""
    quiet_libraries()
    progress = ConsoleProgress()
    lines, notes = compare(recipe, artifacts, seconds, progress)
    for line in lines:
        speed = speed_text(line.faster, line.faster_low, line.faster_high)
        accuracy = f"{line.accuracy:.4f} ({line.kept:.2%} kept, same answer {line.agreement:.2%})"
        size = f"{line.size_bytes / 1e6:.2f} MB {line.smaller:.2f}x"
        typer.echo(f"{line.name:24s} {accuracy}  {line.latency_ms or 0:.3f} ms {speed:20s} {size}  {line.kernels}")
    for note in notes:
        typer.echo(note)
    if output is not None:
        output.write_text(json.dumps({"lines": [asdict(line) for line in lines], "notes": notes}, indent=1) + "\n")


def compare(path: Path, artifacts: Path, seconds: float, progress: Progress) -> tuple[list[Line], list[str]]:
    """Make all files, judge and time them. A quantizer that fails is left out, and a note says why."""
    whole = read_recipe(path)
    kinds = [stage.kind for stage in whole.stages]
    recipe = whole.model_copy(update={"stages": whole.stages[: kinds.index("export") + 1]})
    road = Road(recipe, path.parent, artifacts, progress)
    road.travel()
    folder = artifacts / "benchmarks" / whole.name
    shutil.rmtree(folder, ignore_errors=True)
    last = whole.stages[-1]
    assert isinstance(last, Quantize), "the recipe ends with `quantize`"
    made, notes = _make(road, last, folder, progress)
    rows = road.data.split("test")
    examples = {name: encode_for(place, road.task, rows, recipe.data.max_length) for name, place in made.items()}
    target, threads = TARGETS["cpu"], recipe.benchmark.threads
    answers = {
        name: predict(place, road.task, examples[name], target, threads, progress, name) for name, place in made.items()
    }
    settings = recipe.benchmark.model_copy(update={"seconds": seconds, "batched": False})
    timed = measure_together(made, examples, target, settings, FLOAT, progress, recipe.seed)
    found = {(row.model, row.metric): row for row in timed.measurements}
    accuracy = {name: road.task.measure(each.kept, each.labels, name, "cpu")[0].value for name, each in answers.items()}
    lines = []
    for name, place in made.items():
        speed, latency = found.get((name, "speedup")), found.get((name, "latency_ms"))
        size = size_bytes(place)
        kernels = read_kernels(find_graph(place))
        lines.append(
            Line(
                name,
                accuracy[name],
                accuracy[name] / accuracy[FLOAT],
                road.task.compare(answers[name].kept, answers[FLOAT].kept, name, "cpu")[0].value,
                latency and latency.value,
                speed and speed.value,
                speed and speed.low,
                speed and speed.high,
                size,
                size_bytes(made[FLOAT]) / size,
                f"{sum(kernel.integer for kernel in kernels)} of {len(kernels)} kernels",
            )
        )
    return lines, [*notes, *timed.notes]


def _make(road: Road, stage: Quantize, folder: Path, progress: Progress) -> tuple[dict[str, Path], list[str]]:
    label = road.recipe.labels()[-1]
    model = road.load(label)
    assert isinstance(model, OnnxModel), "the recipe's last stage is its export"
    context = road.context("benchmark")
    chosen = calibration_set(model, context, stage.calibration_examples)
    torch_model = road.load(road.recipe.labels()[-2])
    assert isinstance(torch_model, TorchModel), "what is exported is a torch model"
    examples = context.encode("train", torch_model)

    plain = export_onnx(torch_model, examples, None, fusions=False).graph

    def with_tables(graph: onnx.ModelProto) -> onnx.ModelProto:
        quantize_embeddings(graph, stage.embedding_bits)
        return graph

    ways: dict[str, Callable[[], onnx.ModelProto]] = {
        FLOAT: lambda: model.graph,
        "fp32, plain export": lambda: plain,
        "plain, dynamic": lambda: onnxruntime_dynamic(plain),
        "ONNX Runtime dynamic": lambda: onnxruntime_dynamic(model.graph),
        "ONNX Runtime static": lambda: onnxruntime_static(plain, chosen.feeds),
        "NNCF": lambda: nncf_default(plain, chosen.feeds),
        "ours, dynamic": lambda: with_tables(quantize_products(model.graph, True, False)),
        "ours, static": lambda: stage.run(model, context).graph,
        "ours, NNCF's statistics": lambda: with_tables(
            quantize_int8(model, Int8Options(method="static", statistics="nncf"), context)
        ),
    }
    return write_files(ways, model.companions, folder, progress)


if __name__ == "__main__":
    typer.run(main)
