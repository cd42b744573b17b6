"""Benchmark of a recipe's training stages on a few batches of its own data, run once in a separate process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

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
"""File in which the process reports an error in the data or the model."""
_REVISION = 1
"""Increased when the benchmark itself changes, so that stored results are not used any more."""
_TIMEOUT_SECONDS = 120.0
_INDEPENDENT_FIELDS = {"epochs", "importance_examples", "learning_rate", "warmup_ratio", "weight_decay", "keep_best"}
"""Fields that change the number of examples or the result of a stage, but not the cost of an example."""


class StageTiming(Frozen):
    """Timing of one stage.

    ``seconds`` do not depend on the number of examples, ``example_seconds`` are spent on reading each example, and
    ``step_seconds`` on each example of a training step. ``peak_rss_bytes`` is measured with the longest examples.
    ``shape`` is the shape of the output.
    """

    seconds: float
    example_seconds: float
    step_seconds: float
    peak_rss_bytes: int
    shape: Shape


class StageBenchmarks(Frozen):
    """Timings of a recipe's stages, by label, and properties of its starting model.

    ``uses`` is the number of times that each weight is multiplied per example (its tokens or image positions).
    ``answer_seconds`` is the time of a forward pass per example in torch and float32, ``encode_seconds`` that of
    encoding an example, which then takes ``example_bytes``. ``ready_bytes`` is the memory with libraries, data and
    model loaded.
    """

    start: Shape
    uses: float
    answer_seconds: float
    encode_seconds: float
    example_bytes: float
    ready_seconds: float
    ready_bytes: int
    stages: dict[str, StageTiming] = {}


def benchmark_stages(
    recipe: Recipe, recipe_folder: Path, artifacts: Path, run_now: bool, progress: Progress
) -> StageBenchmarks | None:
    """Return the stored benchmark of a recipe's stages, or run it, or return None if there is none.

    Args:
        recipe: The recipe, whose model and data must be local.
        recipe_folder: The folder that relative paths start from.
        artifacts: The folder below which benchmarks are stored.
        run_now: Run the benchmark if none is stored.
        progress: Is told when the benchmark starts.

    Raises:
        InputError: If the benchmark finds an error in the data or the model.
    """
    stages = [stage.model_dump(mode="json", exclude=_INDEPENDENT_FIELDS) for stage in recipe.resolved().stages]
    key = cache_key(
        {
            "revision": _REVISION,
            "folder": str(recipe_folder.resolve()),
            **{name: getattr(recipe, name) for name in ("task", "model", "module", "random_weights")},
            "module_arguments": dict(recipe.module_arguments),
            "data": recipe.data.model_dump(mode="json"),
            "stages": stages,
            "packages": package_versions(("compress", "torch", "transformers")),
            "machine": [processor(), len(granted_cores()), os.environ.get("OMP_NUM_THREADS")],
        }
    )
    file = artifacts / FOLDER / f"{key}.json"
    if not file.is_file() and run_now:
        progress.note("benchmarking the training stages on a few batches, once: about 20 seconds")
        _run_benchmark(recipe, recipe_folder, file)
    try:
        return StageBenchmarks.model_validate_json(file.read_text())
    except (OSError, ValidationError):
        return None


def _run_benchmark(recipe: Recipe, recipe_folder: Path, file: Path) -> None:
    """Run the benchmark in a separate process, so that the caller loads no torch, and store its result in ``file``."""
    command = [sys.executable, "-m", "compress.pipeline.stage_benchmark_process"]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".trial-") as scratch:
            order = json.dumps(
                {"recipe": recipe.model_dump(mode="json"), "folder": str(recipe_folder), "scratch": scratch}
            )
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    command, input=order, text=True, capture_output=True, timeout=_TIMEOUT_SECONDS, check=False
                )
            refused = Path(scratch) / REFUSED
            if refused.is_file():
                raise InputError(**json.loads(refused.read_text()))
            # Timings of stages before one that failed, or took too long, are valid.
            result = Path(scratch) / "trial.json"
            if result.is_file():
                result.rename(file)
    except OSError:
        return
