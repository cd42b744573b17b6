"""Pictures: the models in turns on the same prompts and noise, by numbers of steps and by sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from compress.benchmark.record import Conditions, Record
from compress.benchmark.restarts import UNTIMED, Reference, keep_memory, losing, repeat_rounds
from compress.benchmark.rounds import Drawing, Turn, WarmUp, in_turn, take_turns, warm_up
from compress.benchmark.subprocess_client import Child
from compress.formats.target_profile import Target

PICTURE, TEXT, STEP, DECODER, LOOP = "picture", "text_encoder", "denoiser_step", "decoder", "scheduler"
"""What is timed: a whole picture, its text, a step of the denoiser, the decoder, and what lies between the calls."""
KINDS = (PICTURE, TEXT, STEP, DECODER, LOOP)


class Setting(NamedTuple):
    """How a picture is drawn: in so many steps, of so many pixels a side; None is what the model has of its own."""

    steps: int | None = None
    size: int | None = None

    @property
    def ending(self) -> str:
        """What the names of its metrics end in."""
        return (f"_steps_{self.steps}" if self.steps else "") + (f"_size_{self.size}" if self.size else "")


@dataclass(frozen=True)
class PicturePlan:
    """A `launches.Plan`: pictures one at a time, in each model's own steps and size first.

    ``steps`` are timed beside the model's own number, ``sizes`` in pixels beside its own. ``prompts`` batches of one
    take turns.
    """

    prompts: int
    steps: Sequence[int] = ()
    sizes: Sequence[int] = ()

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All ways of drawing."""
        return (Setting(), *(Setting(steps=one) for one in self.steps), *(Setting(size=one) for one in self.sizes))

    @property
    def timings(self) -> tuple[str, ...]:
        """See `Plan`."""
        return tuple(kind + setting.ending for setting in self.settings for kind in KINDS)

    @property
    def decisive(self) -> tuple[str, ...]:
        """See `Plan`: whole pictures, and the denoiser's steps."""
        return tuple(kind + setting.ending for setting in self.settings for kind in (PICTURE, STEP))

    @property
    def counted(self) -> Mapping[str, str | None]:
        """See `Plan`: a round has a picture of each model."""
        return {PICTURE + setting.ending: _words(setting) for setting in self.settings}

    def target(self, model: str, usual: Target) -> Target:
        """See `Plan`."""
        return usual

    def timing(self, conditions: Conditions, record: Record) -> _PictureTiming:
        """See `Plan`."""
        return _PictureTiming(self, conditions, record)


def _words(setting: Setting) -> str:
    steps = f" in {setting.steps} steps" if setting.steps else ""
    return steps + (f" of {setting.size} pixels a side" if setting.size else "")


def add_drawings(record: Record, setting: Setting, launch: int, found: Mapping[str, Drawing], pulse_ms: float) -> None:
    """Keep one round of all models. Of their steps as many count as the fewest are, evenly over the way."""
    count = min(len(one.steps_ms) for one in found.values())
    for kind in KINDS:
        turns = {model: _turn(kind, one, count) for model, one in found.items()}
        record.timings[kind + setting.ending].add(range(count if kind == STEP else 1), launch, turns, pulse_ms)


def _turn(kind: str, drawn: Drawing, count: int) -> Turn:
    text, *steps, decoder = drawn.disturbed
    if kind == STEP:
        places = np.round(np.linspace(0, len(drawn.steps_ms) - 1, count)).astype(int)
        return Turn([drawn.steps_ms[place] for place in places], [steps[place] for place in places])
    times = {PICTURE: drawn.picture_ms, TEXT: drawn.text_ms, DECODER: drawn.decoder_ms, LOOP: drawn.loop_ms}
    marks = {TEXT: text, DECODER: decoder}
    return Turn([times[kind]], [marks.get(kind, any(drawn.disturbed))])


class _PictureTiming:
    """A `launches.Timing`."""

    def __init__(self, plan: PicturePlan, conditions: Conditions, record: Record) -> None:
        self._plan, self._conditions, self._record = plan, conditions, record

    def answer_first(self, child: Child, opened: dict[str, Any]) -> None:
        """See `Timing`: a picture in the model's own steps."""
        first = child.draw(0, None, None, self._conditions.timeout_seconds)
        opened["start_up"]["first_picture_ms"] = first.picture_ms

    def warm_up(self, child: Child, seconds: float) -> WarmUp:
        """See `Timing`: every size once, then the model's own until it is steady."""
        settings = self._plan.settings

        def run(calls: Sequence[int]) -> Turn:
            return Turn([self._draw(child, settings[call], 0).picture_ms for call in calls])

        return warm_up(run, range(1, len(settings)), [0], seconds)

    def sample(
        self, children: Mapping[str, Child], number: int, left: Callable[[int], float], reference: Reference
    ) -> None:
        """See `Timing`: rounds of all settings until the launch's share of the time is over."""
        run = partial(self._round, children, number, reference)
        repeat_rounds(run, partial(left, len(self._plan.settings)), self._conditions.deadline)
        keep_memory(children, self._record.single_bytes)

    def _round(self, children: Mapping[str, Child], number: int, reference: Reference, count: int) -> None:
        # Each order comes equally often.
        order = in_turn(list(children), number + count)
        for setting in self._plan.settings:
            turns = {name: partial(self._draw, children[name], setting, number + count) for name in order}
            found, slowest_ms = take_turns(turns, reference.pulse)
            add_drawings(self._record, setting, number, found, slowest_ms)
            reference.now_and_then()

    def _draw(self, child: Child, setting: Setting, count: int) -> Drawing:
        with losing(child.label):
            return child.draw(count % self._plan.prompts, *setting, self._conditions.timeout_seconds, UNTIMED)
