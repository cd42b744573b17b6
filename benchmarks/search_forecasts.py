"""Sizes that a search predicts for untrained recipes, against measured ones.

Command of `benchmarks/search.py`: `size`. Recipes are sampled from the space of `collect`, whose cached
stages are used; they are trained to the first rung only, since training does not change the size.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from search_page import MEASURED_AND_REQUIRED, Write, show

from compress.plugins.ray.jobs import JobContext
from compress.plugins.search.costs import SIZE, CostEstimator
from compress.plugins.search.outcome import Goal, TrialOutcome
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import Point, SearchSpace
from compress.plugins.search.trial import BarsOnly, TrialRunner

RECIPE = Path(__file__).parent / "searching" / "reviews.yaml"
Artifacts = Annotated[Path, typer.Option(help="Folder of the stage cache.")]
Unseen = Annotated[int, typer.Option(help="Recipes to predict.")]


class _PredictedSpace:
    """A search space with its size estimator."""

    def __init__(self, artifacts: Path) -> None:
        from compress.formats.quiet_output import quiet_libraries
        from compress.recipe.document import read_document
        from compress.report.progress import ConsoleProgress

        quiet_libraries()
        self.space = SearchSpace(read_document(RECIPE), RECIPE.parent)
        goal = replace(Goal.from_recipe(self.space.base), minimize=(SIZE,))
        self.trials = TrialRunner.in_process(goal, JobContext(RECIPE.parent, artifacts, BarsOnly(ConsoleProgress())))
        self.size_estimator = SizeEstimator(self.space, lambda: self.trials.context.runner(self.space.base))
        self.costs = CostEstimator(self.space, self.size_estimator)

    def run(self, point: Point) -> TrialOutcome:
        """Run a recipe to the first rung."""
        return self.trials.run(self.space.recipe(point, self.space.search.rungs[0]), timed=False)

    def sample(self, count: int) -> list[Point]:
        """Return random recipes without the one that the search starts from."""
        points = [point for point in self.space.points(0) if point != self.space.origin]
        random.Random(0).shuffle(points)
        return points[:count]


def size(artifacts: Artifacts = Path("artifacts"), unseen: Unseen = 30, write: Write = False) -> None:
    """Compare predicted sizes of unseen recipes with their files."""
    space = _PredictedSpace(artifacts)
    space.costs.update(space.space.origin, 1.0, space.run(space.space.origin))
    errors, seconds = list[int](), list[float]()
    for point in space.sample(unseen):
        start = time.perf_counter()
        predicted = space.size_estimator.size_bytes(point)
        seconds.append(time.perf_counter() - start)
        measured = round(space.run(point).final[SIZE])
        if predicted is None:
            raise typer.BadParameter(f"{space.space.describe(point)}: {space.size_estimator.unavailable_reason}")
        errors.append(predicted - measured)
        typer.echo(f"{space.space.describe(point)}: {predicted:,} bytes, measured {measured:,}, {seconds[-1]:.2f} s")
    rows = [
        [
            f"largest error of predicted bytes, {len(errors)} unseen recipes",
            f"{max(map(abs, errors)):,}",
            "0.5% (aim 0)",
        ],
        ["exact predictions", f"{errors.count(0)}", ""],
        ["seconds per recipe, median", f"{statistics.median(seconds):.2g}", "1"],
        ["seconds in total, including the tracing of each structure", f"{sum(seconds):.0f}", ""],
    ]
    notes = ["`python benchmarks/search.py size --write`"]
    show("Predicted sizes", MEASURED_AND_REQUIRED, rows, write, notes=notes)


def commands() -> Iterator[Any]:
    """Return the commands for `benchmarks/search.py`."""
    yield size
