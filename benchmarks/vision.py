"""INT8 of an image classifier by everyone's defaults and by its recipe: answers kept, speed at batch 1, size.

    python benchmarks/vision.py                       # about 15 minutes on two idle cores
    python benchmarks/vision.py --recipe recipes/efficientnet-int8.yaml --seconds 8 --output vision.json

Everyone quantizes the recipe's float graph with the same calibration pictures, and all files are timed in one session.
`right` is of the recipe's test split, 20 photographs of ImageNet; `same answer` is the agreement with fp32 on the 500
pictures of `sample:objects`: animals, plants, food and things cut out on white, half of them shown twice, whole and
nearer. None of those was used to calibrate. They are no photographs of ImageNet: fp32's own confidence in them is 0.39
in the median, so that many answers lie near a border.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from peers.int8_defaults import onnxruntime_dynamic, onnxruntime_static
from peers.int8_files import FLOAT, speed_text, write_files

from compress.bench.session import measure_together
from compress.cli.console_progress import ConsoleProgress
from compress.data.config import DataConfig
from compress.data.dataset import load_dataset
from compress.evaluate import encode_for
from compress.models.int8.nncf_quantizer import run_nncf
from compress.models.model import size_bytes
from compress.models.onnx_model import OnnxModel
from compress.pipeline.quiet import quiet_libraries
from compress.pipeline.road import Road
from compress.progress import Progress
from compress.quantization.int8_calibration import calibration_set
from compress.recipe_source import read_recipe
from compress.runtimes import get_runtime
from compress.stages.quantize import Quantize
from compress.targets import TARGETS
from compress.tasks.task import Examples

RECIPE = Path(__file__).parents[1] / "recipes" / "efficientnet-int8.yaml"
OTHERS = DataConfig(splits={"train": "sample:objects/train", "test": "sample:objects/test"})
OURS = "ours"


@dataclass(frozen=True)
class Line:
    """One file. ``faster`` is against fp32, with its interval; ``same`` the share of same answers on other pictures."""

    name: str
    right: int
    of: int
    same: float
    latency_ms: float | None
    faster: float | None
    faster_low: float | None
    faster_high: float | None
    size_bytes: int


def main(
    recipe: Annotated[Path, typer.Option(help="A recipe of image-classification that ends in quantize.")] = RECIPE,
    artifacts: Annotated[Path, typer.Option(help="Cache and files.")] = Path("artifacts"),
    seconds: Annotated[float, typer.Option(help="Of timing, for each file; 0: not timed.")] = 8.0,
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """Print the table."""
    quiet_libraries()
    lines, notes = compare(recipe, artifacts, seconds, ConsoleProgress())
    for line in lines:
        speed = speed_text(line.faster, line.faster_low, line.faster_high)
        if line.latency_ms is not None:
            speed = f"{line.latency_ms:.2f} ms, {speed}"
        counts = f"{line.right:3d} of {line.of} right, same answer {line.same:.1%}"
        typer.echo(f"{line.name:22s} {counts}  {speed:32s} {line.size_bytes / 1e6:.2f} MB")
    for note in notes:
        typer.echo(note)
    if output is not None:
        output.write_text(json.dumps({"lines": [asdict(line) for line in lines], "notes": notes}, indent=1) + "\n")


def compare(path: Path, artifacts: Path, seconds: float, progress: Progress) -> tuple[list[Line], list[str]]:
    """Make all files, judge and time them. A quantizer that fails is left out, and a note says why."""
    recipe = read_recipe(path)
    road = Road(recipe, path.parent, artifacts, progress)
    road.travel()
    folder = artifacts / "benchmarks" / recipe.name
    shutil.rmtree(folder, ignore_errors=True)
    made, notes = _make(road, folder, progress)
    examples = {name: encode_for(place, road.task, road.data.split("test"), 128) for name, place in made.items()}
    others = _others(made[FLOAT], road)
    answers = {name: _answers(place, others, recipe.benchmark.threads) for name, place in made.items()}
    found = {}
    if seconds:
        settings = recipe.benchmark.model_copy(update={"seconds": seconds, "batched": False})
        timed = measure_together(made, examples, TARGETS["cpu"], settings, FLOAT, progress, recipe.seed)
        found = {(row.model, row.metric): row for row in timed.measurements}
        notes += timed.notes
    lines = []
    for name, place in made.items():
        labels = examples[name].labels
        assert labels is not None, "the test split has labels"
        right = int((_answers(place, examples[name], recipe.benchmark.threads) == labels).sum())
        speed, latency = found.get((name, "speedup")), found.get((name, "latency_ms"))
        same = float((answers[name] == answers[FLOAT]).mean())
        rates = (speed and speed.value, speed and speed.low, speed and speed.high)
        lines.append(Line(name, right, len(labels), same, latency and latency.value, *rates, size_bytes(place)))
    return lines, notes


def _others(folder: Path, road: Road) -> Examples:
    columns = tuple(column for column in road.task.columns if not column.label)
    rows = load_dataset(OTHERS, columns, Path(), road.progress).split("test")
    return encode_for(folder, road.task, rows, 128)


def _answers(folder: Path, examples: Examples, threads: int) -> np.ndarray:
    """The likeliest class of each example, one by one as at batch 1."""
    session = get_runtime(TARGETS["cpu"].runtime).open(folder, TARGETS["cpu"], threads)
    return np.array([session.predict(examples.batch([i]))["logits"][0].argmax() for i in range(len(examples))])


def _calibration_examples(road: Road) -> int:
    stage = road.recipe.stages[-1]
    assert isinstance(stage, Quantize), "the recipe ends in quantize"
    return stage.calibration_examples


def _make(road: Road, folder: Path, progress: Progress) -> tuple[dict[str, Path], list[str]]:
    labels = road.recipe.labels()
    model, ours = road.load("export", OnnxModel), road.load(labels[-1], OnnxModel)
    assert isinstance(model, OnnxModel) and isinstance(ours, OnnxModel), "the recipe exports and quantizes"
    chosen = calibration_set(model, road.context("benchmark"), _calibration_examples(road))
    ways: dict[str, Callable[[], onnx.ModelProto]] = {
        FLOAT: lambda: model.graph,
        "ONNX Runtime dynamic": lambda: onnxruntime_dynamic(model.graph),
        "ONNX Runtime static": lambda: onnxruntime_static(model.graph, chosen.feeds),
        "NNCF": lambda: run_nncf(model.graph, chosen.feeds, transformer=False),
        OURS: lambda: ours.graph,
    }
    return write_files(ways, model.companions, folder, progress)


if __name__ == "__main__":
    typer.run(main)
