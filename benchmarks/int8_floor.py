"""Compare two searches for the layers to leave in float so that a metric stays above a floor.

    python benchmarks/int8_floor.py                                # a quarter of an hour on two cores
    python benchmarks/int8_floor.py --floor 0.995 --calibration minmax --output floor.json

The recipe's float graph is quantized statically with a calibration that misses the floor (percentiles clip the few
large channels that a transformer depends on). Both searches return layers to float until the metric on the validation
split reaches the floor. The search of `onnx_int8` ranks layers by damage. The greedy search tries every remaining layer
in each round and keeps the best one. Measuring damage takes a few examples and no metric. The last printed ratio also
counts these, as fractions of an evaluation.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.formats.onnx.model import OnnxModel
from compress.formats.quiet_output import quiet_libraries
from compress.models.processor import labels_of, processor_of
from compress.pipeline.runner import StageRunner
from compress.recipe.loading import read_recipe
from compress.report.progress import ConsoleProgress
from compress.stages.onnx_int8.accuracy_aware import Merit, merit_of, search
from compress.stages.onnx_int8.quantizer import calibration_set
from compress.utils.progress import Progress

RECIPE = Path(__file__).parents[1] / "recipes" / "minilm-int8.yaml"
DAMAGE_EXAMPLES = Int8Options.model_fields["damage_examples"].default


@dataclass(frozen=True)
class SearchResult:
    """Result and cost of a search.

    ``forwards`` is the number of examples run through a model divided by the size of the validation split.
    """

    search: str
    metric: float
    float_layers: tuple[str, ...]
    evaluations: int
    forwards: float


def main(
    recipe: Annotated[Path, typer.Option(help="Recipe whose stages up to the export create the float graph.")] = RECIPE,
    artifacts: Annotated[Path, typer.Option(help="Folder of the cache.")] = Path("artifacts"),
    floor: Annotated[float, typer.Option(help="Floor as a share of the float model's metric.")] = 0.99,
    calibration: Annotated[str, typer.Option(help="minmax, percentile, entropy or mse.")] = "percentile",
    output: Annotated[Path | None, typer.Option(help="Write the results as JSON.")] = None,
) -> None:
    """Print the results of both searches and the ratio of their costs."""
    quiet_libraries()
    facts, searches = compare(recipe, artifacts, floor, calibration, ConsoleProgress())
    typer.echo(facts)
    for outcome in searches:
        layers = f"{len(outcome.float_layers)} layers in float: {', '.join(outcome.float_layers) or 'none'}"
        cost = f"{outcome.evaluations} evaluations ({outcome.forwards:.1f} including damage)"
        typer.echo(f"{outcome.search:16s} metric {outcome.metric:.4f}, {cost}, {layers}")
    ours, greedy = searches
    evaluations, forwards = ours.evaluations / greedy.evaluations, ours.forwards / greedy.forwards
    typer.echo(f"ratio of evaluations {evaluations:.3f}, of forwards {forwards:.3f}")
    if output is not None:
        output.write_text(
            json.dumps({"facts": facts, "searches": [asdict(outcome) for outcome in searches]}, indent=1) + "\n"
        )


def compare(
    path: Path, artifacts: Path, floor: float, calibration: str, progress: Progress
) -> tuple[str, tuple[SearchResult, SearchResult]]:
    """Return a description of the problem, then the results of the search by damage and of the greedy search."""
    options = Int8Options.model_validate(
        {"method": "static", "calibration_method": calibration, "accuracy_floor": floor}
    )
    recipe = read_recipe(path)
    kinds = [stage.kind for stage in recipe.stages]
    recipe = recipe.model_copy(update={"stages": recipe.stages[: kinds.index("onnx") + 1]})
    runner = StageRunner(recipe, path.parent, artifacts, progress)
    runner.run_all()
    model, context = runner.load("onnx", OnnxModel), runner.context("benchmark")
    assert isinstance(model, OnnxModel), "the export returns an ONNX model"
    feeds = calibration_set(model, context, options.calibration_examples).feeds
    settings = Int8Options(reduce_range=False, calibration_method=options.calibration_method)
    quantizer = StaticQuantizer(model.graph, feeds, settings)
    rows = runner.inputs.data.split("validation")
    merit = merit_of(
        runner.inputs.task,
        runner.inputs.task.encode(rows, processor_of(model), labels_of(model), recipe.data.max_length),
    )
    damage_feeds = calibration_set(model, context, DAMAGE_EXAMPLES).feeds
    ours = search(model.graph, quantizer, merit, floor, damage_feeds, progress)
    forwards = ours.evaluations + 1 + len(ours.damages) * len(damage_feeds) / len(rows)
    first = SearchResult("ranked by damage", ours.merit, ours.kept, ours.evaluations + 1, forwards)
    second = search_greedily(quantizer, merit, ours.float_merit, ours.floor, progress)
    facts = f"float {ours.float_merit:.4f}, floor {ours.floor:.4f}, {len(quantizer.layers)} layers, {len(rows)} rows"
    return facts, (first, second)


def search_greedily(
    quantizer: StaticQuantizer, merit: Merit, float_merit: float, floor: float, progress: Progress
) -> SearchResult:
    """Return the best remaining layer to float, determined by trying all, until the metric reaches the floor."""
    float_layers: list[str] = []
    metric = merit(quantizer.quantize())
    count = 2
    while metric < floor:
        remaining = [layer.name for layer in quantizer.layers if layer.name not in float_layers]
        metrics = {}
        for name in progress.track(remaining, f"greedy, round {len(float_layers) + 1}", len(remaining)):
            metrics[name] = merit(quantizer.quantize([*float_layers, name]))
            count += 1
        best = max(metrics, key=lambda name: metrics[name])
        float_layers.append(best)
        metric = metrics[best]
        progress.note(f"greedy: {best} in float, metric {metric:.4f} (float {float_merit:.4f})")
    return SearchResult("greedy", metric, tuple(float_layers), count, float(count))


if __name__ == "__main__":
    typer.run(main)
