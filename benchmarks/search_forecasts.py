"""What a search foretells of recipes before they are trained, against what they came to.

Commands of `benchmarks/search.py`: `size` and `latency`. Recipes are drawn from the space of `collect`, whose finished
stages in the folder of artifacts are used again; only the first rung is trained, since neither bytes nor times change.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from search_page import MEASURED_AND_REQUIRED, Write, show

from compress.plugins.ray.jobs import JobContext
from compress.plugins.search.costs import LATENCY, SIZE, CostEstimator
from compress.plugins.search.latency_estimator import LatencyEstimator
from compress.plugins.search.outcome import Goal, TrialOutcome
from compress.plugins.search.size_estimator import SizeEstimator
from compress.plugins.search.space import Point, SearchSpace
from compress.plugins.search.trial import BarsOnly, TrialRunner

RECIPE = Path(__file__).parent / "searching" / "reviews.yaml"
Artifacts = Annotated[Path, typer.Option(help="Where stages are cached.")]
Unseen = Annotated[int, typer.Option(help="Recipes that are foretold.")]


class _Watched:
    """The space with what foretells it, after the first trial."""

    def __init__(self, artifacts: Path) -> None:
        from compress.cli.output import ConsoleProgress
        from compress.formats.quiet_output import quiet_libraries
        from compress.recipe.document import read_document

        quiet_libraries()
        self.space = SearchSpace(read_document(RECIPE), RECIPE.parent)
        goal = replace(Goal.from_recipe(self.space.base), minimize=(SIZE, LATENCY))
        self.trials = TrialRunner.in_process(goal, JobContext(RECIPE.parent, artifacts, BarsOnly(ConsoleProgress())))
        self.size_estimator = SizeEstimator(self.space, lambda: self.trials.context.runner(self.space.base))
        self.latency_estimator = LatencyEstimator(self.size_estimator)
        self.costs = CostEstimator(self.space, self.size_estimator, self.latency_estimator)

    def made(self, point: Point, timed: bool = False) -> TrialOutcome:
        """The recipe at its first rung."""
        return self.trials.run(self.space.recipe(point, self.space.search.rungs[0]), timed)

    def drawn(self, count: int) -> list[Point]:
        """So many recipes, all others than the first."""
        points = [point for point in self.space.points(0) if point != self.space.origin]
        random.Random(0).shuffle(points)
        return points[:count]


def size(artifacts: Artifacts = Path("artifacts"), unseen: Unseen = 30, write: Write = False) -> None:
    """Bytes foretold of recipes that nobody has made, against bytes made."""
    watched = _Watched(artifacts)
    watched.costs.update(watched.space.origin, 1.0, watched.made(watched.space.origin))
    off, seconds = list[int](), list[float]()
    for point in watched.drawn(unseen):
        began = time.perf_counter()
        told = watched.size_estimator.size_bytes(point)
        seconds.append(time.perf_counter() - began)
        made = round(watched.made(point).final[SIZE])
        if told is None:
            raise typer.BadParameter(f"{watched.space.describe(point)}: {watched.size_estimator.unavailable_reason}")
        off.append(told - made)
        typer.echo(f"{watched.space.describe(point)}: {told:,} bytes foretold, {made:,} made, {seconds[-1]:.2f} s")
    exact = sum(one == 0 for one in off)
    rows = [
        [f"bytes foretold of {len(off)} unseen recipes: off by at most", f"{max(map(abs, off)):,}", "0.5% (aim 0)"],
        ["of them exact to the byte", f"{exact}", ""],
        ["seconds a recipe, median", f"{statistics.median(seconds):.2g}", "1"],
        ["seconds of all, with the tracing of each structure", f"{sum(seconds):.0f}", ""],
    ]
    notes = ["`python benchmarks/search.py size --write`"]
    show("Predicted sizes", MEASURED_AND_REQUIRED, rows, write, notes=notes)


def latency(
    artifacts: Artifacts = Path("artifacts"),
    unseen: Unseen = 30,
    seen: Annotated[int, typer.Option(help="Recipes that are timed before, as a search does.")] = 4,
    noisy: Annotated[bool, typer.Option("--noisy", help="Time kernels whoever else is at work.")] = False,
    write: Write = False,
) -> None:
    """Milliseconds foretold of recipes that nobody has timed, against the bench."""
    from scipy.stats import spearmanr

    from compress.plugins.search.kernel_table import KernelTable

    watched = _Watched(artifacts)
    latency_estimator = watched.latency_estimator
    if noisy:
        latency_estimator.table = KernelTable(
            watched.space.base.benchmark.threads, artifacts / "kernels", noisy_too=True
        )
    watched.size_estimator.start(watched.made(watched.space.origin))
    points = watched.drawn(seen + unseen)
    began = time.perf_counter()
    for point in points:
        if latency_estimator.kernel_sum(point) is None:
            raise typer.BadParameter(f"{watched.space.describe(point)}: {latency_estimator.unavailable_reason}")
    spent = time.perf_counter() - began
    for point in points[:seen]:
        latency_estimator.update(point, watched.made(point, timed=True).final[LATENCY])
    told, timed = list[float](), list[float]()
    for point in points[seen:]:
        foretold = latency_estimator.predict(point)
        assert foretold is not None, "its sum is known"
        told.append(foretold)
        timed.append(watched.made(point, timed=True).final[LATENCY])
        words = watched.space.describe(point)
        typer.echo(f"{words}: {told[-1]:.4f} ms foretold, {timed[-1]:.4f} timed ({told[-1] / timed[-1] - 1:+.1%})")
    off = np.abs(np.array(told) / np.array(timed) - 1)
    measured = 0 if latency_estimator.table is None else latency_estimator.table.measured
    rows = [
        [f"times foretold of {len(told)} unseen recipes: rank correlation", f"{spearmanr(told, timed)[0]:.3f}", "0.95"],
        ["mean error", f"{off.mean():.1%}", "8% (aim 5%)"],
        ["largest error", f"{off.max():.1%}", ""],
        [f"whole models timed before, and kernels: {measured} in {spent:.0f} s", f"{seen}", ""],
    ]
    notes = ["`python benchmarks/search.py latency --write`"]
    show("Predicted latencies", MEASURED_AND_REQUIRED, rows, write, notes=notes)


def commands() -> Iterator[Any]:
    """What `benchmarks/search.py` offers of this."""
    yield from (size, latency)
