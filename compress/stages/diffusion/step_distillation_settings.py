"""The parameters by which a generator learns to draw in fewer steps. Importing this imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from compress.utils.pydantic_models import Frozen

_GRID = 50
"""Steps of the teacher from which a consistent student learns (Luo et al. 2023, section 4.3: 1000 / 20)."""
_LEAST_TEACHER = 32
"""Steps of the first teacher of progressive distillation, or the next halving above."""


class FewerSteps(Frozen):
    """How a denoiser learns to do in one step what took its teacher several.

    ``progressive``: one step does what two did, and that again and again (Salimans and Ho 2022, algorithm 2), or what
    ``at_once`` did.
    ``consistency``: every step of a path points at its end (latent consistency: Luo et al. 2023, algorithm 1).
    Classifier-free guidance is folded in, so that a step is one call of the denoiser (Meng et al. 2023, section 3.1).
    """

    method: Literal["progressive", "consistency"] = Field("progressive", description="what a step learns")
    steps: int = Field(4, ge=1, le=64, description="steps that the student draws in")
    teacher_steps: int | None = Field(
        None,
        ge=2,
        le=1000,
        description="steps that the teacher draws in: of progressive `steps` times 2, 4, 8 ..., by default the first "
        "such number from 32 on; of consistency any, by default 50",
    )
    at_once: Literal[2, 4, 8] = Field(
        2,
        description="progressive: how many steps of the teacher become one in a round. More take fewer rounds, each of "
        "which asks the teacher as many times for one step of training",
    )
    solver: Literal["ddim", "dpm-solver++"] = Field(
        "ddim",
        description="progressive: how the teacher's steps that become one are taken: DDIM's as in the paper, or those "
        "of DPM-Solver++ 2M, which come nearer to the teacher's own path",
    )
    guidance_first: bool = Field(
        True,
        description="progressive: guidance is folded in by a round of its own before there are fewer steps, or else by "
        "the first round of these, which saves time",
    )
    guidance: float | tuple[float, float] = Field(
        1.0,
        description="guidance_scale that is folded in, 1 for none; two numbers: the student is told any between them "
        "as timestep_cond, and the artifact's guidance is the first",
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = Field(
        None,
        description="what the student predicts; default: of progressive v_prediction, since x divides by the signal "
        "that is left where epsilon is predicted, of consistency as the teacher",
    )
    loss: Literal["pseudo_huber", "l2"] = Field("pseudo_huber", description="consistency: how far two ends are apart")
    average: float = Field(0.95, ge=0, lt=1, description="consistency: decay of the target's moving average of weights")
    timestep_scaling: float = Field(
        10.0, gt=0, description="consistency: timesteps are multiplied by it in c_skip and c_out"
    )

    @model_validator(mode="after")
    def _steps_fit(self) -> Self:
        if self.method == "progressive" and self.first_steps not in self.halvings:
            raise ValueError(f"teacher_steps: {self.steps} times a power of 2, since each round halves the steps")
        if self.first_steps <= self.steps:
            raise ValueError(f"teacher_steps above steps, {self.steps}")
        return self

    @model_validator(mode="after")
    def _guided(self) -> Self:
        if self.guides[0] < 1 or self.guides[0] > self.guides[1]:
            raise ValueError("guidance of 1 or more; of two numbers the smaller first")
        return self

    @property
    def guides(self) -> tuple[float, float]:
        """The smallest and the largest guidance that is learned."""
        return self.guidance if isinstance(self.guidance, tuple) else (self.guidance, self.guidance)

    @property
    def tells_guidance(self) -> bool:
        """Whether the student is told the guidance."""
        return isinstance(self.guidance, tuple)

    @property
    def first_steps(self) -> int:
        """Of the teacher."""
        if self.teacher_steps is not None:
            return self.teacher_steps
        if self.method == "consistency":
            return _GRID
        return next(count for count in self.halvings if count >= _LEAST_TEACHER and count > self.steps)

    @property
    def halvings(self) -> list[int]:
        """Steps times 2, 4, 8 and so on."""
        return [self.steps << place for place in range(1, 11)]

    @property
    def rounds(self) -> list[int]:
        """Steps that the student of each round draws in, most first; of consistency there is one round."""
        if self.method == "consistency":
            return [self.steps]
        found = [self.first_steps]
        while found[-1] > self.steps:
            found.append(max(self.steps, found[-1] // self.at_once))
        return found[1:]
