"""How long is trained, in steps or in seconds, and what the learning rate is on the way."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

from compress.utils.errors import StageError

_FIRST = 0.01
"""The share of all seconds that the first step is taken to last, before it is over."""


@dataclass
class Length:
    """Length of a training in ``steps``, or as many as fit in ``seconds``; then the rate follows the clock.

    Steps are judged by the mean of those that are done: one that would end beyond ``seconds`` is not begun.
    """

    steps: int
    seconds: float | None = None
    _began: float = field(default=0.0, repr=False)
    _before: float = 0.0
    """Seconds that a killed run has spent."""

    def begin(self) -> None:
        """Let the clock run."""
        self._began = time.monotonic()

    def go_on(self, seconds: float) -> None:
        """Count seconds that were spent before, and let the clock run."""
        self._before = seconds
        self.begin()

    def seconds_spent(self) -> float:
        """Since the beginning, in all runs."""
        return self._before + time.monotonic() - self._began

    def is_over(self, done: int) -> bool:
        """Return whether no further step follows after ``done``. Raises `StageError` if the first took all the time."""
        if self.seconds is None:
            return done >= self.steps
        spent = self.seconds_spent()
        if done == 1 and spent > self.seconds:
            raise StageError(
                f"A budget of {self.seconds:g} s is too short for one step, which took {spent:.1f} s.",
                where="budget",
                expected="time for a few hundred steps",
                hint="raise budget, or lower batch_size or sequence_length",
            )
        return spent + spent / max(done, 1) > self.seconds

    def share(self, done: int) -> float:
        """Return the share of the training that ``done`` steps are, from 0 to 1."""
        return min(done / self.steps if self.seconds is None else self.seconds_spent() / self.seconds, 1.0)

    def of(self) -> str:
        """` of 300`, where the number of steps is known."""
        return f" of {self.steps}" if self.seconds is None else ""

    def steps_in_all(self, done: int) -> int:
        """Return the total number of steps, estimated from those done if time limits the training."""
        if self.seconds is None or done == 0:
            return self.steps
        return max(round(done * self.seconds / self.seconds_spent()), done)

    def rate(self, done: int, warmup_ratio: float, decay: str) -> float:
        """Return the share of the peak rate of the next step: a linear rise, then a fall to 0."""
        if self.seconds is None:
            total, warmup, place = float(self.steps), float(max(1, round(warmup_ratio * self.steps))), float(done)
        else:
            spent = self.seconds_spent()
            step = spent / done if done else _FIRST * self.seconds
            place, total = min(spent, self.seconds) / step, self.seconds / step
            warmup = max(1.0, warmup_ratio * total)
        if place < warmup:
            return min((place + 1) / warmup, 1.0)
        left = (total - place) / max(1, total - warmup)
        return left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2
