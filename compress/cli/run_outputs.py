"""Outputs of a finished run that are still in its cache, and its final model in other formats."""

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
from compress.recipe.recipe import Recipe
from compress.report.run_folder import REPORT
from compress.results.report import FINAL
from compress.utils.errors import InputError
from compress.utils.progress import Progress


def run_of(model: Path) -> Path | None:
    """Return the folder of the finished run that ``model`` is, or is in."""
    folders = (model, model.parent, model / "latest")
    run = next((folder for folder in folders if (folder / REPORT).is_file()), None)
    return None if run is None else run.resolve()


def outputs_of(run: Path) -> dict[str, Path]:
    """Return the folder of each stage's output that is still in the cache, by label."""
    stages = json.loads((run / REPORT).read_text(encoding="utf-8")).get("stages", [])
    cache_folder = run.parents[2] / "cache"
    if not cache_folder.is_dir():
        return {}
    cache = Cache(cache_folder)
    entries = {stage["name"]: cache.peek(stage["key"]) for stage in stages}
    return {name: entry.folder for name, entry in entries.items() if entry is not None}


def final_for(run: Path, recipe: Recipe, target: Target, progress: Progress) -> Path:
    """Return the run's final model in the format of ``target``, from the cache or written there now.

    Args:
        run: Folder of the run.
        recipe: The run's recipe.
        target: The target.
        progress: Is told each step.

    Raises:
        InputError: If the cache no longer has the stages' outputs, or the model cannot be written in that format.
    """
    only_final = recipe.benchmark.model_copy(update={"every_stage": False})
    runner = StageRunner(recipe.model_copy(update={"benchmark": only_final}), run, run.parents[2], progress)
    reason = unsupported_reason(recipe, runner.inputs.start, target, runner.inputs.from_graph)
    if reason is not None:
        raise InputError(f"The run's model is not available for {target.name}: {reason}", where=str(run))
    for label in runner.recipe.labels():
        # A missing output would be trained anew.
        if runner.cache.peek(runner.stage_key(label)) is None:
            raise InputError(
                f"The output of {label} is no longer in the run's cache, or other versions of packages made it.",
                where=str(runner.artifacts),
                hint="run the recipe again, or name the file itself instead of the run",
            )
        runner.run_stage(label)
    options: Mapping[str, Any] = next(
        (profile.options for profile in recipe.profiles() if profile.name == target.name), {}
    )
    return measurable(runner, target.format, options)[FINAL]


def weights_of_run(run: Path) -> Path | None:
    """Return the last output that is a folder of weights in no runtime's format, or None."""
    folders = [folder for folder in outputs_of(run).values() if any(folder.glob("*.safetensors"))]
    return folders[-1] if folders else None
