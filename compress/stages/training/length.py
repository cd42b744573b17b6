"""How long is trained, in steps or in seconds, and what the learning rate is on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from compress.stages.cost_model import SIZE_UNKNOWN, Estimate, PlanContext, Prediction, Shape, predicted
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
            total, warmup, progress = float(self.steps), float(max(1, round(warmup_ratio * self.steps))), float(done)
        else:
            spent = self.seconds_spent()
            step = spent / done if done else _FIRST * self.seconds
            progress, total = min(spent, self.seconds) / step, self.seconds / step
            warmup = max(1.0, warmup_ratio * total)
        if progress < warmup:
            return min((progress + 1) / warmup, 1.0)
        left = (total - progress) / max(1, total - warmup)
        return left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2


FLOPS_FORWARD = 2
"""A multiplication and an addition for each parameter and token (Kaplan et al. 2020, section 2.1)."""
FLOPS_TRAINING = 6
"""Forward and backward (ibid.)."""
TRAINING_BYTES = 16
"""For each parameter in fp32: the weight, its gradient and AdamW's two moments."""


Flops = Callable[[Shape, Shape, float], float | None]
"""Of a training by its input's shape, its output's, and the tokens of an epoch; ``None`` where data is missing."""


def training_prediction(
    batch_size: int,
    before: Shape | None,
    after: Shape | None,
    plan: PlanContext,
    flops: Flops,
    trained: Shape | None,
    teacher: Shape | None = None,
) -> Prediction:
    """Return the predicted cost of a training on the ``train`` split.

    Args:
        batch_size: Examples of a step.
        before: Shape of the stage's input, None if unknown.
        after: Shape of the stage's output, None if unknown.
        plan: Machine and data that the plan assumes.
        flops: Function that returns the FLOPs of an epoch.
        trained: Shape of the model in training.
        teacher: Shape of the teacher in memory, if any.
    """
    seconds = _seconds(before, after, plan, flops)
    return predicted(before, after, seconds, _memory(batch_size, trained, teacher, plan))


def _seconds(before: Shape | None, after: Shape | None, plan: PlanContext, flops: Flops) -> Estimate:
    if not plan.reads_text:
        return Estimate.unknown("the cost of an example is unknown before a first run")
    if before is None or after is None:
        return Estimate.unknown(SIZE_UNKNOWN)
    train = plan.splits.get("train")
    if train is None:
        return Estimate.unknown("the training text is not available yet")
    training_flops = flops(before, after, plan.tokens(train))
    if training_flops is None:
        return Estimate.unknown("the unlabeled text or the teacher is not available yet")
    return plan.seconds(training_flops)


def _memory(batch_size: int, trained: Shape | None, teacher: Shape | None, plan: PlanContext) -> Estimate:
    if trained is None:
        return Estimate.unknown(SIZE_UNKNOWN)
    if not plan.reads_text:
        return Estimate.unknown("predicted for text only")
    if not (trained.hidden and trained.heads):
        return Estimate.unknown("the config names no hidden_size and num_attention_heads")
    activations = activation_bytes(trained, batch_size, plan.max_length)
    held = TRAINING_BYTES * trained.parameters + (4 * teacher.parameters if teacher else 0)
    note = "at most: fp32 weights, gradients, moments, activations of a full batch; without torch itself"
    return Estimate(value=round(held + activations), note=note)


def activation_bytes(shape: Shape, batch: int, length: int) -> float:
    """Activations kept for the backward pass, in fp32: twice the 16-bit sbh(34 + 5as/h) a layer.

    Korthikanti et al. 2022, equation 1.
    """
    per_layer = length * batch * shape.hidden * (34 + 5 * shape.heads * length / shape.hidden)
    return 2 * shape.layers * per_layer
