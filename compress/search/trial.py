"""One trial: a recipe goes down the road, and is judged by the rows that choose."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from compress.data.dataset import Dataset
from compress.errors import CompressError, StorageError, first_line
from compress.measurement import Measurement
from compress.pipeline.formats import measurable
from compress.pipeline.road import Road
from compress.pipeline.target_session import TargetSession
from compress.progress import Progress, SilentProgress
from compress.recipe.recipe import Benchmark, Recipe
from compress.report.schema import BASELINE, FINAL
from compress.search.divergence import NEARNESS, divergence_rows
from compress.search.goal import Goal, target_of
from compress.search.outcome import Outcome, StageCost, figures
from compress.targets import Profile

_LAUNCHES, _SECONDS = 3, 0.7


@dataclass
class Trials:
    """Runs trials in this process. Data is read once, for all of them are judged and trained on the same."""

    goal: Goal
    folder: Path
    artifacts: Path
    progress: Progress
    _read: tuple[object, Dataset] | None = field(default=None, init=False)
    """The data, and what of a recipe says which it is."""

    def road(self, recipe: Recipe) -> Road:
        """A road for a recipe of the search."""
        road = Road(recipe, self.folder, self.artifacts, _Quiet(self.progress))
        told = recipe.data, recipe.task, recipe.slices
        if self._read is not None and self._read[0] == told:
            road.data = self._read[1]
        else:
            self._read = told, road.data
        return road

    def travelled(self, recipe: Recipe) -> Road:
        """A road at whose end a recipe has come, measured there by its baseline and its final model alone."""
        benchmark = recipe.benchmark.model_copy(update={"every_stage": False})
        road = self.road(recipe.model_copy(update={"benchmark": benchmark}))
        road.travel()
        return road

    def run(self, recipe: Recipe, timed: bool) -> Outcome:
        """Make and judge it; with ``timed`` it is timed too, where the goal has a time in it.

        What a recipe fails by is its outcome; a disk that is full or cannot be written ends the search.
        """
        began = time.perf_counter()
        try:
            return self._judged(recipe, timed and self.goal.timed, began)
        except StorageError:
            raise
        except CompressError as error:
            return Outcome(error=first_line(error), seconds=time.perf_counter() - began)

    def _judged(self, recipe: Recipe, timed: bool, began: float) -> Outcome:
        search = recipe.search
        assert search is not None
        road = self.travelled(recipe.model_copy(update={"benchmark": _brief(recipe.benchmark)}))
        session = session_of(road, target_profile(recipe), search.select.split)
        rows = measured(session, timed)
        stages = tuple(
            StageCost(label=label, key=one.entry.key, seconds=one.record.seconds, cached=one.record.cached)
            for label, one in road.finished.items()
        )
        return Outcome.model_validate(
            {
                **figures(rows, (*self.goal.wanted, *NEARNESS)),
                "model": session.digests[FINAL],
                "stages": stages,
                "seconds": time.perf_counter() - began,
            }
        )


def target_profile(recipe: Recipe) -> Profile:
    """The target that trials are measured on."""
    assert recipe.search is not None
    name = target_of(recipe, recipe.search)
    return next(profile for profile in recipe.profiles() if profile.name == name)


def session_of(road: Road, profile: Profile, split: str) -> TargetSession:
    """The baseline and the final model of a recipe that has been run, in the format of its target."""
    artifacts = measurable(road, profile.target.format, profile.options)
    return TargetSession(road, profile, {label: artifacts[label] for label in (BASELINE, FINAL)}, split)


def measured(session: TargetSession, timed: bool) -> list[Measurement]:
    """Sizes and answers, and times where they are asked for."""
    rows = [*session.sizes(), *session.accuracies([]), *divergence_rows(session)]
    return [*rows, *(session.timings(remeasure=False)[0] if timed else ())]


def _brief(benchmark: Benchmark) -> Benchmark:
    """Times good enough to choose by; the session at the end takes the recipe's own."""
    return benchmark.model_copy(
        update={
            "batched": False,
            "launches": min(benchmark.launches, _LAUNCHES),
            "seconds": min(benchmark.seconds, _SECONDS),
        }
    )


class _Quiet(SilentProgress):
    """Bars of what is long; what stages say of themselves would drown what the search says."""

    def __init__(self, inner: Progress) -> None:
        self.track = inner.track  # type: ignore[method-assign]
