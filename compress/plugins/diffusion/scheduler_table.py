"""A scheduler of diffusers as a table of numbers, by which an app draws without diffusers.

What a scheduler makes of the noise z, of what the denoiser gave so far and of noise of its own is a sum of these, each
times a number that only the number of steps decides. So are DDIM, DPM-Solver++, UniPC, Euler and LCM; not so are those
that clip, or look at the size of what they are given.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from compress.utils.errors import ModelError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


_SAME = 1e-4
"""How far latents may be off, as a share of the largest: diffusers computes in float32."""
_NOTHING = 1e-12
"""What rounding leaves of a number that has no say."""
_FIRST, _SECOND = 0, 1
_SIZE = 64

Denoise = Callable[[np.ndarray, float], np.ndarray]
"""Latents and a timestep -> what the denoiser gives, guidance applied."""
OnStep = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class StepTable:
    """At step i the denoiser is given ``scales[i]`` times the latents, and ``timesteps[i]``.

    The latents at first are ``initial`` times z. Those behind step i are ``noise[i]`` times z, ``outputs[i][j]`` times
    what it gave at each step j up to i, and ``added[i][j]`` times noise of step j.
    """

    initial: float
    timesteps: tuple[float, ...]
    scales: tuple[float, ...]
    noise: tuple[float, ...]
    outputs: tuple[tuple[float, ...], ...]
    added: tuple[tuple[float, ...], ...]

    @property
    def adds_noise(self) -> bool:
        """Whether there is any of the steps."""
        return any(value for row in self.added for value in row)

    def draw(
        self, denoise: Denoise, noise: np.ndarray, added: np.ndarray | None = None, on_step: OnStep | None = None
    ) -> np.ndarray:
        """The latents that noise ends as; ``added`` [steps, ...] is that of each step.

        ``on_step`` is told the number of a step that is done, from 1 on, and its latents.
        """
        start = noise.astype(np.float64)
        given = np.empty((len(self.timesteps), *noise.shape))
        latents = self.initial * start
        for place, (time, scale) in enumerate(zip(self.timesteps, self.scales, strict=True)):
            given[place] = denoise((scale * latents).astype(np.float32), time)
            latents = self.noise[place] * start + np.tensordot(self.outputs[place], given[: place + 1], 1)
            if added is not None:
                latents += np.tensordot(self.added[place], added[: place + 1], 1)
            if on_step is not None:
                on_step(place + 1, latents.astype(np.float32))
        return latents.astype(np.float32)


def step_table(scheduler: SchedulerMixin, steps: int) -> StepTable:
    """The table of ``steps`` of a scheduler.

    Read from the scheduler itself: each number that goes into a step has an entry of a vector to itself. Then it is
    proven on numbers drawn at random. Raises `ModelError` for a scheduler that is no such sum.
    """
    import torch

    walks = [_Walk(scheduler, steps, seed) for seed in (_FIRST, _SECOND)]
    timesteps = [float(time) for time in walks[0].scheduler.timesteps]
    count = len(timesteps)
    initial = float(walks[0].scheduler.init_noise_sigma)
    sample = torch.zeros(1, 1, 1, 1 + 2 * count, dtype=torch.float64)
    sample[..., 0] = initial
    scales, rows = [], []
    for place in range(count):
        output = torch.zeros_like(sample)
        output[..., 1 + place] = 1
        scales.append(walks[0].scale(place))
        walks[1].scale(place)
        (one, drawn), (other, drawn_otherwise) = (walk.step(place, output, sample) for walk in walks)
        apart = drawn - drawn_otherwise
        share = float(((one - other) * apart).sum() / apart.square().sum())
        share = share if abs(share) > _SAME else 0.0
        sample = one - share * drawn
        sample[..., 1 + count + place] += share
        sample[sample.abs() < _NOTHING] = 0
        rows.append(sample.flatten().tolist())
    table = StepTable(
        initial,
        tuple(timesteps),
        tuple(scales),
        tuple(row[0] for row in rows),
        tuple(tuple(row[1 : 2 + place]) for place, row in enumerate(rows)),
        tuple(tuple(row[1 + count : 2 + count + place]) for place, row in enumerate(rows)),
    )
    _prove(table, scheduler, steps)
    return table


def set_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Let a scheduler make so many; it raises what it does where it can't."""
    with warnings.catch_warnings():
        # Of numpy, for how schedulers call it.
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(steps)


class _Walk:
    """A scheduler on its way, and the noise that it draws."""

    def __init__(self, scheduler: SchedulerMixin, steps: int, seed: int) -> None:
        import torch

        self.scheduler = type(scheduler).from_config(scheduler.config)
        set_steps(self.scheduler, steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.seeded = "generator" in inspect.signature(self.scheduler.step).parameters

    def scale(self, place: int) -> float:
        """What latents are multiplied by before the denoiser sees them."""
        import torch

        return float(self.scheduler.scale_model_input(torch.ones(1), self.scheduler.timesteps[place]))

    def step(self, place: int, output: Any, sample: Any) -> tuple[Any, Any]:
        """The latents behind it, and the noise that would be drawn of that shape."""
        import torch

        at = self.generator.get_state()
        drawn = torch.randn(sample.shape, generator=self.generator, dtype=sample.dtype)
        self.generator.set_state(at)
        options = {"generator": self.generator} if self.seeded else {}
        found = self.scheduler.step(output, self.scheduler.timesteps[place], sample, **options, return_dict=False)[0]
        return found.to(sample.dtype), drawn


def _prove(table: StepTable, scheduler: SchedulerMixin, steps: int) -> None:
    import torch

    walk = _Walk(scheduler, steps, _SECOND)
    noise = torch.randn(1, 1, 1, _SIZE, generator=torch.Generator().manual_seed(_FIRST), dtype=torch.float64)
    outputs, added = [], []
    latents = noise * walk.scheduler.init_noise_sigma
    for place in range(len(table.timesteps)):
        walk.scale(place)
        # As large as what networks give, and larger: a scheduler that clips shows it.
        outputs.append(3 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(place), dtype=noise.dtype))
        latents, drawn = walk.step(place, outputs[-1], latents)
        added.append(drawn)
    left = iter(outputs)
    found = table.draw(lambda given, time: next(left).numpy(), noise.numpy(), torch.stack(added).numpy())
    apart, largest = np.abs(found - latents.numpy()).max(), np.abs(latents.numpy()).max()
    if not apart <= _SAME * largest:
        raise ModelError(
            f"What {type(scheduler).__name__} makes is no sum of noise and of what the denoiser gives.",
            where="scheduler/scheduler_config.json",
            expected="clip_sample: false, thresholding: false, and no steps of its own choice",
            hint="set them so, or take another scheduler by the stage schedule",
        )
