"""Timing of artifacts, by the kind of task: batches of examples, images, or generated tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compress.benchmark.generation import measure_generation
from compress.benchmark.restarts import LOCAL_HOST, BenchmarkHost
from compress.benchmark.session import PRECISION, BenchmarkResult, measure_side_by_side
from compress.formats.target_profile import Target
from compress.models.pipeline_folder import image_generation_hook
from compress.recipe.recipe import Benchmark
from compress.tasks.capability import GENERATES, GENERATES_IMAGES
from compress.tasks.task import Examples, Task
from compress.utils.progress import Progress


def time_artifacts(
    task: Task,
    artifacts: Mapping[str, Path],
    examples: Mapping[str, Examples],
    target: Target,
    settings: Benchmark,
    baseline: str,
    progress: Progress,
    seed: int,
    precision: float = PRECISION,
    confidence: float = 0.95,
    host: BenchmarkHost = LOCAL_HOST,
) -> BenchmarkResult:
    """Time all artifacts in one interleaved session, each with its own encoding of the same examples.

    Args:
        task: The task, which decides how artifacts are timed.
        artifacts: Folder of each model by label.
        examples: Encoded examples by label.
        target: The target.
        settings: The recipe's benchmark settings.
        baseline: Label that speed-ups refer to.
        progress: Is told each round.
        seed: Seed of the order of rounds.
        precision: Relative precision at which timing stops.
        confidence: Confidence of the intervals.
        host: This machine, or a device.

    Raises:
        CompressError: As `measure_side_by_side`, the hook `time_artifacts` or `measure_generation`.
    """
    shared: dict[str, Any] = {"precision": precision, "confidence": confidence, "host": host}
    if GENERATES_IMAGES in task.capabilities:
        time_images = image_generation_hook("time_artifacts")
        result: BenchmarkResult = time_images(artifacts, examples, target, settings, baseline, progress, seed, **shared)
        return result
    if GENERATES not in task.capabilities:
        return measure_side_by_side(artifacts, examples, target, settings, baseline, progress, seed, **shared)
    longest = max(settings.contexts)
    texts = {label: beginning(examples[label], longest) for label in artifacts}
    return measure_generation(artifacts, texts, target, settings, baseline, progress, seed, **shared)


def beginning(examples: Examples, tokens: int) -> list[int]:
    """Return the first ``tokens`` tokens of the examples, or all if there are fewer."""
    ids = np.concatenate([example["input_ids"] for example in examples.inputs])
    return [int(token) for token in ids[:tokens]]
