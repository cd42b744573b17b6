"""How near a scheduler in few steps comes to where many steps lead, from the same noise and for the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.plugins.diffusion.sampler import PictureSampler
from compress.plugins.diffusion.scheduler import UNTRAINED, Choice, Tried, best_untrained, fitting_scheduler

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


_REFERENCE = Choice("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"})
"""Of second order, so that at many steps next to nothing is left of its error."""


@dataclass(frozen=True)
class Path:
    """Where many ``steps`` of a sampler lead: latents [n, channels, h, w] of prompts and noise."""

    sampler: PictureSampler
    ids: np.ndarray
    noise: np.ndarray
    steps: int
    end: np.ndarray = field(repr=False)

    @classmethod
    def of(cls, sampler: PictureSampler, ids: np.ndarray, noise: np.ndarray, steps: int) -> Path:
        """Walk it, by DPM-Solver++ 2M (Lu et al. 2022). Raises `InputError` where that doesn't fit the denoiser."""
        scheduler = fitting_scheduler(sampler.scheduler, _REFERENCE, steps)
        sampling = replace(sampler.sampling, steps=steps)
        return cls(
            sampler, ids, noise, steps, replace(sampler, scheduler=scheduler, sampling=sampling).denoised(ids, noise)
        )

    def distance(self, sampler: PictureSampler) -> float:
        """The root mean square by which another sampler's latents are off, relative to the latents' own."""
        found = sampler.denoised(self.ids, self.noise, seeds=range(len(self.noise)))
        return float(np.sqrt(np.mean((found - self.end) ** 2) / np.mean(self.end**2)))

    def measure(self, steps: int) -> Callable[[Any], float]:
        """The distance of the same denoiser with another scheduler and so many steps."""
        sampling = replace(self.sampler.sampling, steps=steps)
        return lambda scheduler: self.distance(replace(self.sampler, scheduler=scheduler, sampling=sampling))

    def best(self, steps: int) -> tuple[Any, list[Tried]]:
        """The untrained scheduler that comes nearest in so many steps, and all that were tried, nearest first."""
        return best_untrained(self.sampler.scheduler, steps, self.measure(steps), UNTRAINED)


COLUMNS = ("scheduler", "distance")


def rows_of(tried: list[Tried]) -> list[tuple[str, float | str]]:
    """Of a stage's table: each choice, and its distance or why it doesn't fit."""
    return [(str(one.choice), one.reason if one.error is None else round(one.error, 5)) for one in tried]


def chosen(base: object, scheduler: str, steps: int, fields: Mapping[str, object]) -> SchedulerMixin:
    """The scheduler of that name, where it fits. Raises `InputError`."""
    return fitting_scheduler(base, Choice(scheduler, fields), steps)
