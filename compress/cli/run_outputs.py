"""What a finished run's cache still has: each stage's output, and its final model in other formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.formats.target_profile import Target
from compress.pipeline.cache import Cache
from compress.pipeline.format_support import unsupported_reason
from compress.pipeline.formats import measurable
from compress.pipeline.runner import StageRunner
from compress.recipe.recipe import START, Recipe
from compress.report.run_folder import REPORT
from compress.results.report import FINAL
from compress.utils.errors import InputError
from compress.utils.progress import Progress


def run_of(model: Path) -> Path | None:
    """The finished run's folder that ``model`` is, or lies in."""
    found = next((place for place in (model, model.parent, model / "latest") if (place / REPORT).is_file()), None)
    return None if found is None else found.resolve()


def outputs_of(run: Path) -> dict[str, Path]:
    """Stage's label -> the folder of its output, for those that are still in the cache of a run's folder."""
    stages = json.loads((run / REPORT).read_text(encoding="utf-8")).get("stages", [])
    place = run.parents[2] / "cache"
    if not place.is_dir():
        return {}
    cache = Cache(place)
    entries = {stage["name"]: cache.peek(stage["key"]) for stage in stages}
    return {name: entry.folder for name, entry in entries.items() if entry is not None}


def final_for(run: Path, recipe: Recipe, target: Target, progress: Progress) -> Path:
    """The run's final model as ``target`` is given it, from the cache or written there now.

    Raises `InputError` where the cache has lost what it is written from, or nothing leads to that format.
    """
    only_final = recipe.benchmark.model_copy(update={"every_stage": False})
    runner = StageRunner(recipe.model_copy(update={"benchmark": only_final}), run, run.parents[2], progress)
    reason = unsupported_reason(recipe, runner.inputs.start, target, runner.inputs.from_graph)
    if reason is not None:
        raise InputError(f"The run's model is not to be had for {target.name}: {reason}", where=str(run))
    _walk(runner)
    options: Mapping[str, Any] = next((one.options for one in recipe.profiles() if one.name == target.name), {})
    return measurable(runner, target.format, options)[FINAL]


def weights_of_run(run: Path) -> Path | None:
    """The last output that is a folder of weights in no runtime's format yet."""
    found = [folder for folder in outputs_of(run).values() if any(folder.glob("*.safetensors"))]
    return found[-1] if found else None


def _walk(runner: StageRunner) -> None:
    """Down a runner whose outputs are all in the cache; a missing one would be trained anew."""
    before = START
    for label, stage in zip(runner.recipe.labels(), runner.recipe.stages, strict=True):
        key = runner.keys.stage(
            stage, runner.digest_of(before), [runner.digest_of(other) for other in stage.refers_to()]
        )
        if runner.cache.peek(key) is None:
            raise InputError(
                f"The output of {label} is no longer in the run's cache, or was made by other versions.",
                where=str(runner.artifacts),
                hint="run the recipe again, or name the file itself in place of the run",
            )
        runner.results[label] = runner.apply(label, stage, before)
        before = label
