"""A floor on the metric: how many evaluations the ranking by damage needs, and how many a search layer by layer.

    python benchmarks/int8_floor.py                                # a quarter of an hour on two cores
    python benchmarks/int8_floor.py --floor 0.995 --calibration minmax --output floor.json

The recipe's float graph is quantized statically, with a calibration that misses the floor (percentiles cut off the
few large channels that a transformer relies on). Both searches put layers back into float until the metric on the
validation split is at the floor. The plain one tries every layer that is left, keeps back the one that helps most,
and begins again. Measuring a layer's damage takes a few examples and no metric; in the last figure they are counted
as well, as shares of an evaluation.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

from compress.cli.output import ConsoleProgress
from compress.formats.onnx.int8.settings import Int8Options
from compress.formats.onnx.int8.static import StaticQuantizer
from compress.formats.onnx.model import OnnxModel
from compress.formats.quiet_output import quiet_libraries
from compress.models.processor import labels_of, processor_of
from compress.pipeline.runner import StageRunner
from compress.recipe.loading import read_recipe
from compress.stages.onnx_int8.accuracy_aware import Merit, merit_of, search
from compress.stages.onnx_int8.quantizer import calibration_set
from compress.utils.progress import Progress

RECIPE = Path(__file__).parents[1] / "recipes" / "minilm-int8.yaml"
DAMAGE_EXAMPLES = Int8Options.model_fields["damage_examples"].default


@dataclass(frozen=True)
class Found:
    """What a search ended with: the metric, the layers left in float, and what it cost.

    ``forwards`` is in evaluations: examples that went through a model over those of the validation split.
    """

    search: str
    metric: float
    kept: tuple[str, ...]
    evaluations: int
    forwards: float


def main(
    recipe: Annotated[Path, typer.Option(help="Its stages up to the export make the float graph.")] = RECIPE,
    artifacts: Annotated[Path, typer.Option(help="Cache and files.")] = Path("artifacts"),
    floor: Annotated[float, typer.Option(help="Share of the float model's metric.")] = 0.99,
    calibration: Annotated[str, typer.Option(help="minmax, percentile, entropy or mse.")] = "percentile",
    output: Annotated[Path | None, typer.Option(help="Also write everything as JSON.")] = None,
) -> None:
    """Print both searches and by how much they differ."""
    quiet_libraries()
    facts, searches = compare(recipe, artifacts, floor, calibration, ConsoleProgress())
    typer.echo(facts)
    for outcome in searches:
        float_layers = f"{len(outcome.kept)} layers in float: {', '.join(outcome.kept) or 'none'}"
        cost = f"{outcome.evaluations} evaluations ({outcome.forwards:.1f} with what damage took)"
        typer.echo(f"{outcome.search:16s} metric {outcome.metric:.4f}, {cost}, {float_layers}")
    ours, plain = searches
    typer.echo(
        f"a share of {ours.evaluations / plain.evaluations:.3f}, of all forwards {ours.forwards / plain.forwards:.3f}"
    )
    if output is not None:
        output.write_text(
            json.dumps({"facts": facts, "searches": [asdict(outcome) for outcome in searches]}, indent=1) + "\n"
        )


def compare(
    path: Path, artifacts: Path, floor: float, calibration: str, progress: Progress
) -> tuple[str, tuple[Found, Found]]:
    """Facts in words, then our search and the plain one."""
    options = Int8Options.model_validate(
        {"method": "static", "calibration_method": calibration, "accuracy_floor": floor}
    )
    whole = read_recipe(path)
    kinds = [stage.kind for stage in whole.stages]
    recipe = whole.model_copy(update={"stages": whole.stages[: kinds.index("onnx") + 1]})
    runner = StageRunner(recipe, path.parent, artifacts, progress)
    runner.run_all()
    model, context = runner.load("onnx", OnnxModel), runner.context("benchmark")
    assert isinstance(model, OnnxModel), "the recipe's last stage is its export"
    feeds = calibration_set(model, context, options.calibration_examples).feeds
    settings = Int8Options(
        reduce_range=False, calibration_method=options.calibration_method, percentile=options.percentile
    )
    quantizer = StaticQuantizer(model.graph, feeds, settings)
    rows = runner.inputs.data.split("validation")
    merit = merit_of(
        runner.inputs.task,
        runner.inputs.task.encode(rows, processor_of(model), labels_of(model), recipe.data.max_length),
    )
    damage_feeds = calibration_set(model, context, DAMAGE_EXAMPLES).feeds
    ours = search(model.graph, quantizer, merit, floor, damage_feeds, float("inf"), progress)
    forwards = ours.evaluations + 1 + ours.passes * len(damage_feeds) / len(rows)
    first = Found("ranked by damage", ours.merit, ours.kept, ours.evaluations + 1, forwards)
    second = layer_by_layer(quantizer, merit, ours.float_merit, ours.floor, progress)
    facts = f"float {ours.float_merit:.4f}, floor {ours.floor:.4f}, {len(quantizer.layers)} layers, {len(rows)} rows"
    return facts, (first, second)


def layer_by_layer(
    quantizer: StaticQuantizer, merit: Merit, float_merit: float, floor: float, progress: Progress
) -> Found:
    """Put back the layer that helps most, each found by trying all, until the floor holds."""
    float_layers: list[str] = []
    metric = merit(quantizer.quantize())
    count = 2
    while metric < floor:
        left = [layer.name for layer in quantizer.layers if layer.name not in float_layers]
        tried = {}
        for name in progress.track(left, f"layer by layer, round {len(float_layers) + 1}", len(left)):
            tried[name] = merit(quantizer.quantize([*float_layers, name]))
            count += 1
        best = max(tried, key=lambda name: tried[name])
        float_layers.append(best)
        metric = tried[best]
        progress.note(f"layer by layer: {best} back in float, metric {metric:.4f} (float {float_merit:.4f})")
    return Found("layer by layer", metric, tuple(float_layers), count, float(count))


if __name__ == "__main__":
    typer.run(main)
