"""What workers make for a night before it is measured here: the outputs of every recipe's stages, into the cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from compress.pipeline.run import with_absolute_paths
from compress.plugins.nightly.suite import SuiteEntry
from compress.plugins.ray.jobs import Job, JobContext
from compress.plugins.ray.ray_workers import open_workers
from compress.recipe.loading import read_recipe
from compress.utils.errors import CompressError, first_line
from compress.utils.progress import Progress, SilentProgress


def prefetch_stages(
    entries: Sequence[SuiteEntry], home: Path, artifacts: Path, workers: str, seconds: float, progress: Progress
) -> None:
    """Have the workers make what entries will need, for so many seconds at most; each runs as ever afterwards.

    What fails here fails again, and is told, when the entry runs. Raises `InputError` where the workers can't be had.
    """
    journeys, labels, packages = list[Job](), list[str](), set[str]()
    for entry in entries:
        place = home / entry.recipe
        try:
            recipe = with_absolute_paths(read_recipe(place, entry.overrides), place.parent)
        except CompressError:
            continue  # told by the entry's own run
        if recipe.module is None:
            journeys.append(Job(recipe))
            labels.append(entry.label)
            packages |= {name for stage in recipe.stages for name in stage.called_packages()}
    began, names = time.monotonic(), sorted(packages)
    at_work = open_workers(workers, JobContext(home, artifacts, SilentProgress()), "cpu", names, progress)
    try:
        for label, arrival in zip(labels, at_work.run_all(journeys), strict=True):
            made = sum(not stage.cached for stage in arrival.stages)
            said = f"{made} stages made" if arrival.error is None else first_line(arrival.error)
            progress.note(f"{label}: {said} by the workers")
            if time.monotonic() - began > seconds:
                progress.note("the workers are stopped: the night's budget is used up")
                break
    except CompressError as error:
        progress.note(f"the workers made no more: {first_line(error)}")
    finally:
        at_work.close()
