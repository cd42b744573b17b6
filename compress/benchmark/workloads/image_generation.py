"""Pictures: the models in turns on the same prompts and noise, by numbers of steps and by sizes."""

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
"""What is timed: a whole picture, its text, a step of the denoiser, the decoder, and what lies between the calls."""
KINDS = (IMAGE, TEXT, STEP, DECODER, LOOP)


class ImageSetting(NamedTuple):
    """How a picture is drawn: in so many steps, of so many pixels a side; None is what the model has of its own."""

    steps: int | None = None
    size: int | None = None

    @property
    def suffix(self) -> str:
        """What the names of its metrics end in."""
        return (f"_steps_{self.steps}" if self.steps else "") + (f"_size_{self.size}" if self.size else "")


@dataclass(frozen=True)
class ImageGenerationPlan:
    """A `launches.Plan`: pictures one at a time, in each model's own steps and size first.

    ``token_timing`` are timed beside the model's own number, ``sizes`` in pixels beside its own. ``prompt_timing`` batches of one
    take turns.
    """

    prompts: int
    steps: Sequence[int] = ()
    sizes: Sequence[int] = ()

    @property
    def settings(self) -> tuple[ImageSetting, ...]:
        """All ways of drawing."""
        return (ImageSetting(), *(ImageSetting(steps=one) for one in self.steps), *(ImageSetting(size=one) for one in self.sizes))

    @property
    def timings(self) -> tuple[str, ...]:
        """See `WorkloadPlan`."""
        return tuple(kind + setting.suffix for setting in self.settings for kind in KINDS)

    @property
    def deciding_timings(self) -> tuple[str, ...]:
        """See `WorkloadPlan`: whole pictures, and the denoiser's steps."""
        return tuple(kind + setting.suffix for setting in self.settings for kind in (IMAGE, STEP))

    @property
    def reported(self) -> Mapping[str, str | None]:
        """See `WorkloadPlan`: a round has a picture of each model."""
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


def add_image_round(record: TimingRecord, setting: ImageSetting, launch: int, found: Mapping[str, ImageTimes], pulse_ms: float) -> None:
    """Keep one round of all models. Of their steps as many count as the fewest are, evenly over the way."""
    count = min(len(one.steps_ms) for one in found.values())
    for kind in KINDS:
        turns = {model: _turn(kind, one, count) for model, one in found.items()}
        record.timings[kind + setting.suffix].add(range(count if kind == STEP else 1), launch, turns, pulse_ms)


def _turn(kind: str, drawn: ImageTimes, count: int) -> RoundTimes:
    text, *steps, decoder = drawn.disturbed
    if kind == STEP:
        places = np.round(np.linspace(0, len(drawn.steps_ms) - 1, count)).astype(int)
        return RoundTimes([drawn.steps_ms[place] for place in places], [steps[place] for place in places])
    times = {IMAGE: drawn.image_ms, TEXT: drawn.text_ms, DECODER: drawn.decoder_ms, LOOP: drawn.loop_ms}
    marks = {TEXT: text, DECODER: decoder}
    return RoundTimes([times[kind]], [marks.get(kind, any(drawn.disturbed))])


class _PictureTiming:
    """A `launches.Timing`."""

    def __init__(self, plan: ImageGenerationPlan, conditions: TimingConditions, record: TimingRecord) -> None:
        self._plan, self._conditions, self._record = plan, conditions, record

    def time_first_answer(self, child: WorkerProcess, opened: dict[str, Any]) -> None:
        """See `WorkloadTimer`: a picture in the model's own steps."""
        first = child.generate_image(0, None, None, self._conditions.timeout_seconds)
        opened["start_up"]["first_picture_ms"] = first.image_ms

    def warm_up(self, child: WorkerProcess, seconds: float) -> WarmUp:
        """See `WorkloadTimer`: every size once, then the model's own until it is steady."""
        settings = self._plan.settings

        def run(calls: Sequence[int]) -> RoundTimes:
            return RoundTimes([self._draw(child, settings[call], 0).image_ms for call in calls])

        return warm_up(run, range(1, len(settings)), [0], seconds)

    def sample(
        self, children: Mapping[str, WorkerProcess], number: int, left: Callable[[int], float], reference: ReferenceTimer
    ) -> None:
        """See `WorkloadTimer`: rounds of all settings until the launch's share of the time is over."""
        run = partial(self._round, children, number, reference)
        repeat_rounds(run, partial(left, len(self._plan.settings)), self._conditions.deadline)
        record_peak_memory(children, self._record.single_bytes)

    def _round(self, children: Mapping[str, WorkerProcess], number: int, reference: ReferenceTimer, count: int) -> None:
        # Each order comes equally often.
        order = round_order(list(children), number + count)
        for setting in self._plan.settings:
            turns = {name: partial(self._draw, children[name], setting, number + count) for name in order}
            found, slowest_ms = run_round(turns, reference.time_small_product)
            add_image_round(self._record, setting, number, found, slowest_ms)
            reference.measure_periodically()

    def _draw(self, child: WorkerProcess, setting: ImageSetting, count: int) -> ImageTimes:
        with naming_lost_model(child.label):
            return child.generate_image(count % self._plan.prompts, *setting, self._conditions.timeout_seconds, UNTIMED_CALLS)
