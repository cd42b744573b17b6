"""Timing session of image generation: whole images and their components."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from compress.benchmark.host import LOCAL_HOST, BenchmarkHost
from compress.benchmark.record import TimingConditions, TimingRecord
from compress.benchmark.restarts import Workload
from compress.benchmark.results import MeasurementWriter
from compress.benchmark.rounds import evenly_spaced
from compress.benchmark.session import (
    PRECISION,
    BenchmarkResult,
    build_result,
    check_host,
    find_equal_artifacts,
    seconds_left,
)
from compress.benchmark.worker import write_batches
from compress.formats.target_profile import Target
from compress.plugins.diffusion.workload import DECODER, IMAGE, LOOP, STEP, TEXT, ImageGenerationPlan, ImageSetting
from compress.recipe.recipe import Benchmark
from compress.results.report import Measurement
from compress.tasks.task import Examples
from compress.utils.errors import DataError, InputError
from compress.utils.progress import Progress

_PROMPTS = 8
"""Number of prompts. All images are the same work, so this is enough for a median over several prompts."""
_A_PICTURE = "a picture is that of one prompt; with guidance the empty prompt's text and steps are part of it"
_PARTS = (TEXT, STEP, DECODER, LOOP)


def measure_image_generation(
    artifacts: Mapping[str, Path],
    examples: Mapping[str, Examples],
    target: Target,
    settings: Benchmark,
    baseline: str,
    progress: Progress,
    seed: int,
    timeout_seconds: float = 600.0,
    precision: float = PRECISION,
    confidence: float = 0.95,
    host: BenchmarkHost = LOCAL_HOST,
) -> BenchmarkResult:
    """Time image generation of every artifact, and compare each with ``artifacts[baseline]``.

    An image takes its text encoder once, the denoiser once for each step, and the decoder. Each is timed, and the
    whole. Every model first uses its own number of steps and its own size, then each of ``settings.picture_steps`` and
    of ``settings.picture_sizes``. Equal artifacts are timed once and reported under each label. Launches of fresh
    processes, precision and deadline are as in `measure_side_by_side`.

    Args:
        artifacts: Model folder by label.
        examples: Prompts as each artifact's own processor encodes them, by label.
        target: Target that all models run on.
        settings: Benchmark settings of the recipe.
        baseline: Label of the baseline.
        progress: Progress display.
        seed: Seed of the random choices.
        timeout_seconds: Longest wait for one answer of a process.
        precision: Half the width of the interval of a ratio at which sampling stops.
        confidence: Confidence of that interval.
        host: Machine that the processes run on. Only this machine is supported.

    Raises:
        DataError: There is no prompt.
        InputError: ``host`` is another machine, or a model cannot use the steps or the size.
        StageError: The target is unavailable, or the baseline's process died or hung.
    """
    began = time.perf_counter()
    check_host(artifacts, baseline, [target], host)
    if host is not LOCAL_HOST:
        raise InputError("Pictures are timed on this machine alone.", expected="no device: drawing takes torch")
    counts = {len(examples[label]) for label in artifacts}
    if len(counts) != 1:
        raise InputError(f"The models' prompts differ in number: {sorted(counts)}.", expected="the same rows for each")
    if counts == {0}:
        raise DataError("There is no prompt to time.", expected="at least one row in the test split")
    chosen = evenly_spaced(list(range(*counts)), _PROMPTS)
    plan = ImageGenerationPlan(len(chosen), sorted(set(settings.picture_steps)), sorted(set(settings.picture_sizes)))
    timed_as = find_equal_artifacts(artifacts)
    names = list(dict.fromkeys(timed_as.values()))
    with tempfile.TemporaryDirectory(prefix="compress-bench-") as scratch:
        files = {}
        for number, name in enumerate(names):
            files[name] = Path(scratch) / f"{number}.npz"
            write_batches(files[name], [examples[name].batch([row]) for row in chosen])
        conditions = TimingConditions(
            target=host.target(target),
            baseline=timed_as[baseline],
            threads=settings.threads,
            launches=settings.launches,
            seconds=settings.seconds,
            precision=precision,
            confidence=confidence,
            seed=seed,
            timeout_seconds=timeout_seconds,
            seconds_left=seconds_left(settings.budget_seconds, began),
        )
        workload = Workload({name: artifacts[name] for name in names}, files, files, plan)
        timed = host.time(workload, conditions, progress)
    record, rows = timed.record.undisturbed(), []
    for label, name in timed_as.items():
        if name not in record.lost_models:
            writer = MeasurementWriter(label, conditions.target.name, seed)
            for setting in plan.settings:
                rows += image_rows(writer, record, name, setting)
                rows += speedup_rows(writer, record, name, timed_as[baseline], setting) if len(artifacts) > 1 else []
            rows += writer.starts(record, name)
    precise = "times of pictures", "raise benchmark.seconds or quieten the machine"
    return build_result(timed, plan, conditions, rows, (_A_PICTURE,), precise, timed_as, prompts=len(chosen))


def image_rows(writer: MeasurementWriter, record: TimingRecord, model: str, setting: ImageSetting) -> list[Measurement]:
    """Return the measurements of one model in one setting: latency of an image, and time of each component.

    Args:
        writer: Writer of the model's measurements.
        record: Record of the session.
        model: Name of the model in the record.
        setting: Steps and size of the images.
    """
    suffix = setting.suffix
    whole = record.timings[IMAGE + suffix].by_launch(model)
    tails: dict[str, float] = {} if suffix else {"latency_p90_ms": 0.9}
    rows = writer.times(whole, {f"latency_ms{suffix}": 0.5, **tails})
    for part in _PARTS:
        rows += writer.times(record.timings[part + suffix].by_launch(model), {f"{part}_ms{suffix}": 0.5})
    return rows


def speedup_rows(
    writer: MeasurementWriter, record: TimingRecord, model: str, baseline: str, setting: ImageSetting
) -> list[Measurement]:
    """Return the speed-ups over the baseline of an image, and of each component but the scheduler.

    Args:
        writer: Writer of the model's measurements.
        record: Record of the session.
        model: Name of the model in the record.
        baseline: Name of the baseline in the record.
        setting: Steps and size of the images.
    """
    names = {"speedup": IMAGE, **{f"speedup_{part}": part for part in (TEXT, STEP, DECODER)}}
    return [
        writer.speedup(metric + setting.suffix, record.timings[part + setting.suffix], model, baseline)
        for metric, part in names.items()
    ]
