"""Timing session of image generation: whole images and their components."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compress.benchmark.record import TimingConditions, TimingRecord
from compress.benchmark.restarts import (
    LOCAL_HOST,
    UNTIMED_CALLS,
    BenchmarkHost,
    GenerationTimer,
    Workload,
    naming_lost_model,
)
from compress.benchmark.results import MeasurementWriter
from compress.benchmark.rounds import ImageTimes, RoundTimes, WarmUp, evenly_spaced, warm_up
from compress.benchmark.session import (
    PRECISION,
    BenchmarkResult,
    SamplingLimits,
    build_result,
    check_host,
    find_equal_artifacts,
    more_precise,
    time_workload,
)
from compress.benchmark.subprocess_client import WorkerProcess
from compress.benchmark.worker import write_batches
from compress.formats.target_profile import Target
from compress.recipe.recipe import Benchmark
from compress.results.report import Measurement
from compress.tasks.task import Examples
from compress.utils.errors import DataError, InputError
from compress.utils.progress import Progress

IMAGE, TEXT, STEP, DECODER, LOOP = "picture", "text_encoder", "denoiser_step", "decoder", "scheduler"
"""Kinds of work: a whole image, its text encoder, a denoiser step, the decoder, and the time between these calls."""
KINDS = (IMAGE, TEXT, STEP, DECODER, LOOP)


class ImageSetting(NamedTuple):
    """Number of denoising steps and side in pixels of an image. None stands for the model's own number."""

    steps: int | None = None
    size: int | None = None

    @property
    def suffix(self) -> str:
        """Return the suffix of the names of its metrics."""
        return (f"_steps_{self.steps}" if self.steps else "") + (f"_size_{self.size}" if self.size else "")


@dataclass(frozen=True)
class ImageGenerationPlan:
    """`WorkloadPlan` of images one at a time, first with each model's own steps and size.

    ``steps`` and ``sizes`` (in pixels) are timed beside the model's own numbers. The first ``prompts`` batches, of one
    prompt each, are used one after another.
    """

    prompts: int
    steps: Sequence[int] = ()
    sizes: Sequence[int] = ()

    @property
    def settings(self) -> tuple[ImageSetting, ...]:
        """Return all combinations of steps and size that are timed."""
        return (
            ImageSetting(),
            *(ImageSetting(steps=value) for value in self.steps),
            *(ImageSetting(size=value) for value in self.sizes),
        )

    @property
    def timings(self) -> tuple[str, ...]:
        """See `WorkloadPlan`."""
        return tuple(kind + setting.suffix for setting in self.settings for kind in KINDS)

    @property
    def deciding_timings(self) -> tuple[str, ...]:
        """See `WorkloadPlan`: whole images, and the denoiser's steps."""
        return tuple(kind + setting.suffix for setting in self.settings for kind in (IMAGE, STEP))

    @property
    def reported(self) -> Mapping[str, str | None]:
        """See `WorkloadPlan`: a round has an image of each model."""
        return {IMAGE + setting.suffix: _words(setting) for setting in self.settings}

    def target(self, model: str, usual: Target) -> Target:
        """See `WorkloadPlan`."""
        return usual

    def timer(self, conditions: TimingConditions, record: TimingRecord) -> _PictureTimer:
        """See `WorkloadPlan`."""
        return _PictureTimer(self, conditions, record)


def _words(setting: ImageSetting) -> str:
    steps = f" in {setting.steps} steps" if setting.steps else ""
    return steps + (f" of {setting.size} pixels a side" if setting.size else "")


def add_image_round(
    record: TimingRecord, setting: ImageSetting, launch: int, images: Mapping[str, ImageTimes], product_ms: float
) -> None:
    """Add one round of all models.

    Models may need different numbers of steps. As many steps count as the model with the fewest has, spread evenly.

    Args:
        record: Record that the round is added to.
        setting: Steps and size of the images.
        launch: Number of the set of processes.
        images: Times of each model's image.
        product_ms: Longest time of the reference product during the round.
    """
    count = min(len(image.steps_ms) for image in images.values())
    for kind in KINDS:
        times = {model: _turn(kind, image, count) for model, image in images.items()}
        record.timings[kind + setting.suffix].add(range(count if kind == STEP else 1), launch, times, product_ms)


def _turn(kind: str, image: ImageTimes, count: int) -> RoundTimes:
    text, *steps, decoder = image.disturbed
    if kind == STEP:
        positions = np.round(np.linspace(0, len(image.steps_ms) - 1, count)).astype(int)
        return RoundTimes(
            [image.steps_ms[position] for position in positions], [steps[position] for position in positions]
        )
    times = {IMAGE: image.image_ms, TEXT: image.text_ms, DECODER: image.decoder_ms, LOOP: image.loop_ms}
    marks = {TEXT: text, DECODER: decoder}
    return RoundTimes([times[kind]], [marks.get(kind, any(image.disturbed))])


class _PictureTimer(GenerationTimer[ImageSetting, ImageTimes]):
    """`WorkloadTimer` of images."""

    def __init__(self, plan: ImageGenerationPlan, conditions: TimingConditions, record: TimingRecord) -> None:
        super().__init__(plan.settings, conditions, record)
        self._prompts = plan.prompts

    def time_first_answer(self, child: WorkerProcess, opened: dict[str, Any]) -> None:
        """See `WorkloadTimer`: an image with the model's own steps."""
        first = child.generate_image(0, None, None, self.conditions.timeout_seconds)
        opened["start_up"]["first_picture_ms"] = first.image_ms

    def warm_up(self, child: WorkerProcess, seconds: float) -> WarmUp:
        """See `WorkloadTimer`: every size once, then the model's own size until its times are steady."""

        def run(calls: Sequence[int]) -> RoundTimes:
            return RoundTimes([self.generate(child, self.settings[call], 0).image_ms for call in calls])

        return warm_up(run, range(1, len(self.settings)), [0], seconds)

    def generate(self, child: WorkerProcess, setting: ImageSetting, number: int) -> ImageTimes:
        """See `GenerationTimer`; prompts are used one after another."""
        prompt, timeout = number % self._prompts, self.conditions.timeout_seconds
        with naming_lost_model(child.label):
            return child.generate_image(prompt, *setting, timeout, UNTIMED_CALLS)

    def add_round(
        self, setting: ImageSetting, launch: int, generated: Mapping[str, ImageTimes], product_ms: float
    ) -> None:
        """See `GenerationTimer`."""
        add_image_round(self.record, setting, launch, generated, product_ms)


_PROMPTS = 8
"""Number of prompts. All images are the same work, so this is enough for a median over several prompts."""
_A_PICTURE = "an image is that of one prompt; with guidance, the empty prompt's text encoding and steps are included"
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
        raise InputError("Images are only timed locally.", expected="no device: image generation requires torch")
    counts = {len(examples[label]) for label in artifacts}
    if len(counts) != 1:
        raise InputError(f"Different numbers of prompts: {sorted(counts)}.", expected="the same rows for each")
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
        workload = Workload({name: artifacts[name] for name in names}, files, files, plan)
        limits = SamplingLimits(seed, timeout_seconds, precision, confidence)
        timed, conditions = time_workload(workload, host, target, settings, timed_as[baseline], limits, began, progress)
    record, rows = timed.record.undisturbed(), []
    for label, name in timed_as.items():
        if name not in record.lost_models:
            writer = MeasurementWriter(label, conditions.target.name, seed)
            for setting in plan.settings:
                rows += image_rows(writer, record, name, setting)
                rows += speedup_rows(writer, record, name, timed_as[baseline], setting) if len(artifacts) > 1 else []
            rows += writer.starts(record, name)
    precise = "times of images", more_precise(settings)
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
