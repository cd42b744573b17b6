"""What a recipe's training stages cost on a few batches of its own data, tried once in a process of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from compress.recipe.recipe import Recipe
from compress.stages.cost_model import Shape
from compress.utils.environment import granted_cores, package_versions, processor
from compress.utils.errors import InputError
from compress.utils.progress import Progress
from compress.utils.pydantic_models import Frozen
from compress.utils.storage import cache_key

FOLDER = "trials"
REFUSED = "refused.json"
"""What is wrong with data or model, as a trial's process leaves it."""
_REVISION = 1
"""Raised when the same stages would be tried otherwise."""
_TIMEOUT_SECONDS = 120.0
_FREE = ("epochs", "importance_examples", "learning_rate", "warmup_ratio", "weight_decay", "keep_best")
"""Fields that change how much of a stage's work there is, or its outcome, and not what an example costs."""


class StageTrial(Frozen):
    """What one stage took: ``seconds`` whatever it is given, ``example_seconds`` for reading each example, and
    ``step_seconds`` for each time that it learns from one.

    ``peak_rss_bytes`` is seen with the longest examples; ``shape`` is that of its output.
    """

    seconds: float
    example_seconds: float
    step_seconds: float
    peak_rss_bytes: int
    shape: Shape


class Trial(Frozen):
    """What was tried of a recipe, by label, and what its starting model is like.

    ``uses``: how often an example has each working weight multiply, its tokens or positions of an image.
    ``answer_seconds`` for each example in torch and float32; ``encode_seconds`` before, for its inputs, which then take
    ``example_bytes``. ``ready_bytes``: the memory with libraries, data and model, and nothing done yet.
    """

    start: Shape
    uses: float
    answer_seconds: float
    encode_seconds: float
    example_bytes: float
    ready_seconds: float
    ready_bytes: int
    stages: dict[str, StageTrial] = {}


def tried(recipe: Recipe, recipe_folder: Path, artifacts: Path, makes: bool, progress: Progress) -> Trial | None:
    """The trial of a recipe's stages: as it was kept below ``artifacts``, or with ``makes`` made now.

    None where there is none, or nothing came of it. The files of model and data must be here. Raises `InputError` for
    what is found to be wrong with them.
    """
    file = artifacts / FOLDER / f"{_key(recipe, recipe_folder)}.json"
    if not file.is_file() and makes:
        progress.note("trying the stages that train on a few batches, once: some 20 seconds")
        _make(recipe, recipe_folder, file)
    try:
        return Trial.model_validate_json(file.read_text())
    except (OSError, ValidationError):
        return None


def _key(recipe: Recipe, folder: Path) -> str:
    stages = [_without(stage.model_dump(mode="json")) for stage in recipe.settled().stages]
    return cache_key(
        {
            "revision": _REVISION,
            "folder": str(folder.resolve()),
            **{name: getattr(recipe, name) for name in ("task", "model", "module", "random_weights")},
            "module_arguments": dict(recipe.module_arguments),
            "data": recipe.data.model_dump(mode="json"),
            "stages": stages,
            "packages": package_versions(("compress", "torch", "transformers")),
            "machine": [processor(), len(granted_cores()), os.environ.get("OMP_NUM_THREADS")],
        }
    )


def _without(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in _FREE}


def _make(recipe: Recipe, recipe_folder: Path, file: Path) -> None:
    """Try the stages in a process of their own, so that the caller loads no torch, and keep what was found."""
    command = [sys.executable, "-m", "compress.pipeline.stage_benchmark_process"]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".trial-") as scratch:
            order = {"recipe": recipe.model_dump(mode="json"), "folder": str(recipe_folder), "scratch": scratch}
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    command,
                    input=json.dumps(order),
                    text=True,
                    capture_output=True,
                    timeout=_TIMEOUT_SECONDS,
                    check=False,
                )
            refused = Path(scratch) / REFUSED
            if refused.is_file():
                raise InputError(**json.loads(refused.read_text()))
            # What was tried before a stage failed, or took too long, holds all the same.
            found = Path(scratch) / "trial.json"
            if found.is_file():
                found.rename(file)
    except OSError:
        return
