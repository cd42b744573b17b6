"""A scheduler of diffusers as a table of numbers, with which an app samples without diffusers.

The latents after each step are a weighted sum of the initial noise z, the denoiser's outputs so far, and noise that the
scheduler adds. The weights depend only on the number of steps. This holds for DDIM, DPM-Solver++, UniPC, Euler and LCM,
but not for schedulers that clip or look at the magnitude of their inputs.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compress.utils.errors import ModelError

if TYPE_CHECKING:
    import torch
    from diffusers import SchedulerMixin

_TOLERANCE = 1e-4
"""Largest accepted error, as a share of the largest value. diffusers computes in float32."""
_ROUNDING = 1e-12
"""Weights below this are rounding errors of 0."""
_SEEDS = (0, 1)

Denoise = Callable[[np.ndarray, float], np.ndarray]
"""Function from latents and a timestep to the denoiser's output, guidance applied."""
OnStep = Callable[[int, np.ndarray], None]


@dataclass(frozen=True)
class SchedulerTable:
    """Weights of each step.

    At step i the denoiser takes ``scales[i]`` times the latents, and ``timesteps[i]``. The first latents are
    ``initial`` times z. Those after step i are ``noise[i]`` times z, plus ``outputs[i][j]`` times the output and
    ``added[i][j]`` times the added noise of each step j up to i.
    """

    initial: float
    timesteps: tuple[float, ...]
    scales: tuple[float, ...]
    noise: tuple[float, ...]
    outputs: tuple[tuple[float, ...], ...]
    added: tuple[tuple[float, ...], ...]

    @property
    def adds_noise(self) -> bool:
        """True if any step adds noise."""
        return any(value for row in self.added for value in row)

    def sample(
        self, denoise: Denoise, noise: np.ndarray, added: np.ndarray | None = None, on_step: OnStep | None = None
    ) -> np.ndarray:
        """Return the final latents, of the shape of ``noise``.

        Args:
            denoise: Denoiser with guidance.
            noise: Initial noise.
            added: Noise of each step, [steps, ...].
            on_step: Called after each step with its number, from 1 on, and its latents.
        """
        start = noise.astype(np.float64)
        outputs = np.empty((len(self.timesteps), *noise.shape))
        latents = self.initial * start
        for step, (timestep, scale) in enumerate(zip(self.timesteps, self.scales, strict=True)):
            outputs[step] = denoise((scale * latents).astype(np.float32), timestep)
            latents = self.noise[step] * start + np.tensordot(self.outputs[step], outputs[: step + 1], 1)
            if added is not None:
                latents += np.tensordot(self.added[step], added[: step + 1], 1)
            if on_step is not None:
                on_step(step + 1, latents.astype(np.float32))
        return latents.astype(np.float32)


def build_scheduler_table(scheduler: SchedulerMixin, steps: int) -> SchedulerTable:
    """Read the weights of ``steps`` steps from a scheduler, and verify them on random numbers.

    Raises:
        ModelError: The scheduler computes no weighted sum.
    """
    import torch

    runs = [_SchedulerRun(scheduler, steps, seed) for seed in _SEEDS]
    timesteps = [float(timestep) for timestep in runs[0].scheduler.timesteps]
    count = len(timesteps)
    initial = float(runs[0].scheduler.init_noise_sigma)
    # Each input of the sum gets its own element: z, then the outputs of all steps, then the added noise of all steps.
    # The scheduler works elementwise, so that its result holds the weight of each input.
    sample = torch.zeros(1, 1, 1, 1 + 2 * count, dtype=torch.float64)
    sample[..., 0] = initial
    scales, rows = [], []
    for step in range(count):
        output = torch.zeros_like(sample)
        output[..., 1 + step] = 1
        scales.append(runs[0].input_scale(step))
        runs[1].input_scale(step)
        # Two seeds reveal the weight of the added noise: only the noise differs between the runs.
        (first, first_noise), (second, second_noise) = (run.step(step, output, sample) for run in runs)
        noise_difference = first_noise - second_noise
        weight = float(((first - second) * noise_difference).sum() / noise_difference.square().sum())
        weight = weight if abs(weight) > _TOLERANCE else 0.0
        # Replace the actual noise by its own element.
        sample = first - weight * first_noise
        sample[..., 1 + count + step] += weight
        sample[sample.abs() < _ROUNDING] = 0
        rows.append(sample.flatten().tolist())
    table = SchedulerTable(
        initial,
        tuple(timesteps),
        tuple(scales),
        tuple(row[0] for row in rows),
        tuple(tuple(row[1 : 2 + step]) for step, row in enumerate(rows)),
        tuple(tuple(row[1 + count : 2 + count + step]) for step, row in enumerate(rows)),
    )
    _verify(table, scheduler, steps)
    return table


def set_steps(scheduler: SchedulerMixin, steps: int) -> None:
    """Set the number of steps, in place. The scheduler raises its own errors if it cannot."""
    with warnings.catch_warnings():
        # diffusers' schedulers call NumPy in a deprecated way.
        warnings.simplefilter("ignore", DeprecationWarning)
        scheduler.set_timesteps(steps)


class _SchedulerRun:
    """Scheduler during sampling, whose added noise is known."""

    def __init__(self, scheduler: SchedulerMixin, steps: int, seed: int) -> None:
        import torch

        self.scheduler = type(scheduler).from_config(scheduler.config)
        set_steps(self.scheduler, steps)
        self.generator = torch.Generator().manual_seed(seed)
        self.takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters

    def input_scale(self, step: int) -> float:
        """Return the factor on latents before the denoiser takes them."""
        import torch

        return float(self.scheduler.scale_model_input(torch.ones(1), self.scheduler.timesteps[step]))

    def step(self, step: int, output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the latents after a step, and the noise that the scheduler would add."""
        import torch

        # The scheduler samples its noise from the same generator state.
        state = self.generator.get_state()
        noise = torch.randn(sample.shape, generator=self.generator, dtype=sample.dtype)
        self.generator.set_state(state)
        options = {"generator": self.generator} if self.takes_generator else {}
        latents = self.scheduler.step(output, self.scheduler.timesteps[step], sample, **options, return_dict=False)[0]
        return latents.to(sample.dtype), noise


def _verify(table: SchedulerTable, scheduler: SchedulerMixin, steps: int) -> None:
    """Compare the table with the scheduler on random outputs. Raises `ModelError`."""
    import torch

    run = _SchedulerRun(scheduler, steps, _SEEDS[1])
    noise = torch.randn(1, 1, 1, 64, generator=torch.Generator().manual_seed(_SEEDS[0]), dtype=torch.float64)
    outputs, added = [], []
    latents = noise * run.scheduler.init_noise_sigma
    for step in range(len(table.timesteps)):
        run.input_scale(step)
        # Three times as large as the outputs of networks, so that a scheduler that clips is recognized.
        outputs.append(3 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(step), dtype=noise.dtype))
        latents, step_noise = run.step(step, outputs[-1], latents)
        added.append(step_noise)
    remaining = iter(outputs)
    sampled = table.sample(lambda _, timestep: next(remaining).numpy(), noise.numpy(), torch.stack(added).numpy())
    error, largest = np.abs(sampled - latents.numpy()).max(), np.abs(latents.numpy()).max()
    # A NaN fails this comparison too.
    if not error <= _TOLERANCE * largest:
        raise ModelError(
            f"The steps of {type(scheduler).__name__} are no sum of noise and outputs of the denoiser.",
            where="scheduler/scheduler_config.json",
            expected="clip_sample: false, thresholding: false, and no steps of its own choice",
            hint="set them so, or take another scheduler by the stage schedule",
        )
