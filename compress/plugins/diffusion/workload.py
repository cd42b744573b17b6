"""Image generation workload: interleaved images of all models from the same prompts and noise, by steps and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from compress.benchmark.record import TimingConditions, TimingRecord
from compress.benchmark.restarts import (
    UNTIMED_CALLS,
    ReferenceTimer,
    naming_lost_model,
    record_peak_memory,
    repeat_rounds,
)
from compress.benchmark.rounds import ImageTimes, RoundTimes, WarmUp, round_order, run_round, warm_up
from compress.benchmark.subprocess_client import WorkerProcess
from compress.formats.target_profile import Target

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

    def timer(self, conditions: TimingConditions, record: TimingRecord) -> _PictureTiming:
        """See `WorkloadPlan`."""
        return _PictureTiming(self, conditions, record)


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


class _PictureTiming:
    """`WorkloadTimer` of images."""

    def __init__(self, plan: ImageGenerationPlan, conditions: TimingConditions, record: TimingRecord) -> None:
        self._plan, self._conditions, self._record = plan, conditions, record

    def time_first_answer(self, child: WorkerProcess, opened: dict[str, Any]) -> None:
        """See `WorkloadTimer`: an image with the model's own steps."""
        first = child.generate_image(0, None, None, self._conditions.timeout_seconds)
        opened["start_up"]["first_picture_ms"] = first.image_ms

    def warm_up(self, child: WorkerProcess, seconds: float) -> WarmUp:
        """See `WorkloadTimer`: every size once, then the model's own size until its times are steady."""
        settings = self._plan.settings

        def run(calls: Sequence[int]) -> RoundTimes:
            return RoundTimes([self._draw(child, settings[call], 0).image_ms for call in calls])

        return warm_up(run, range(1, len(settings)), [0], seconds)

    def sample(
        self,
        children: Mapping[str, WorkerProcess],
        number: int,
        left: Callable[[int], float],
        reference: ReferenceTimer,
    ) -> None:
        """See `WorkloadTimer`: rounds of all settings until the launch's share of the time is over."""
        run = partial(self._round, children, number, reference)
        repeat_rounds(run, partial(left, len(self._plan.settings)), self._conditions.deadline)
        record_peak_memory(children, self._record.single_bytes)

    def _round(self, children: Mapping[str, WorkerProcess], number: int, reference: ReferenceTimer, count: int) -> None:
        # Each order comes equally often.
        order = round_order(list(children), number + count)
        for setting in self._plan.settings:
            runs = {name: partial(self._draw, children[name], setting, number + count) for name in order}
            images, product_ms = run_round(runs, reference.time_small_product)
            add_image_round(self._record, setting, number, images, product_ms)
            reference.measure_periodically()

    def _draw(self, child: WorkerProcess, setting: ImageSetting, count: int) -> ImageTimes:
        with naming_lost_model(child.label):
            return child.generate_image(
                count % self._plan.prompts, *setting, self._conditions.timeout_seconds, UNTIMED_CALLS
            )
