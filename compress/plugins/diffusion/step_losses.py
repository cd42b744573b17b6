"""Formulas of diffusion in discrete time, and losses of denoisers that learn to sample in fewer steps.

z_t = alpha_t x + sigma_t epsilon, with alpha_t^2 + sigma_t^2 = 1. x: clean latents, z: noisy latents, epsilon: noise,
t: timestep, B: batch. Noise levels are [B, 1, ...], so that they multiply [B, ...].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import nn

from compress.plugins.diffusion.sampler import TEXT

_TIMESTEP_SCALING, _DATA_DEVIATION = 10.0, 0.5
"""Factor on timesteps, and standard deviation of the data, in the boundary condition of consistency models."""

PredictionType = Literal["epsilon", "sample", "v_prediction"]
"""Output of a denoiser, by diffusers' names: epsilon, x, or v = alpha epsilon - sigma x (Salimans and Ho 2022, 4)."""


class NoiseLevel(NamedTuple):
    """Weights of the signal and of the noise at a timestep."""

    alpha: torch.Tensor
    sigma: torch.Tensor


@dataclass(frozen=True)
class NoiseSchedule:
    """Values of alpha_t^2 at each timestep [T], and ``final`` for the level after the last step."""

    squares: torch.Tensor
    final: float = 1.0

    def __len__(self) -> int:
        return len(self.squares)

    def levels(self, timesteps: torch.Tensor, axes: int) -> NoiseLevel:
        """Return the levels of timesteps [B] with ``axes`` axes, [B, 1, ...]. A negative timestep is after the last."""
        squares = torch.cat([self.squares.new_tensor([self.final]), self.squares]).to(timesteps.device)
        square = squares[(timesteps + 1).clamp(min=0)].reshape(-1, *[1] * (axes - 1))
        return NoiseLevel(square.sqrt(), (1 - square).sqrt())


def add_noise(clean: torch.Tensor, noise: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
    """Return z of x and epsilon, [B, ...]."""
    return level.alpha * clean + level.sigma * noise


def predicted_clean(
    prediction_type: PredictionType, output: torch.Tensor, noisy: torch.Tensor, level: NoiseLevel
) -> torch.Tensor:
    """Return the x [B, ...] that a denoiser's output for z stands for.

    Args:
        prediction_type: Quantity that the denoiser predicts.
        output: Output of the denoiser, [B, ...].
        noisy: Noisy latents z, [B, ...].
        level: Noise level of each row.
    """
    if prediction_type == "sample":
        return output
    if prediction_type == "epsilon":
        return (noisy - level.sigma * output) / level.alpha
    return level.alpha * noisy - level.sigma * output


def apply_guidance(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float) -> torch.Tensor:
    """Apply classifier-free guidance as diffusers does: ``scale`` is 1 + w of Ho and Salimans (2022, equation 6)."""
    return unconditional + scale * (conditional - unconditional)


def ddim_step(clean: torch.Tensor, noisy: torch.Tensor, start: NoiseLevel, end: NoiseLevel) -> torch.Tensor:
    """Return z_s = alpha_s x + sigma_s / sigma_t (z_t - alpha_t x) (Song et al. 2021, equation 12).

    Args:
        clean: Predicted x, [B, ...].
        noisy: Noisy latents z_t, [B, ...].
        start: Level of t.
        end: Level of s, the next timestep.
    """
    return end.alpha * clean + end.sigma / start.sigma * (noisy - start.alpha * clean)


def extrapolate(
    clean: torch.Tensor, previous_clean: torch.Tensor, previous: NoiseLevel, start: NoiseLevel, end: NoiseLevel
) -> torch.Tensor:
    """Return the x with which a `ddim_step` is of second order (DPM-Solver++ 2M; Lu et al. 2022, algorithm 2).

    x + (x - x_previous) h / (2 h_previous), where h are steps of log(alpha / sigma). If no noise is left at the end of
    the step, x itself.

    Args:
        clean: x predicted at this step.
        previous_clean: x predicted at the previous step.
        previous: Level at the start of the previous step.
        start: Level at the start of this step.
        end: Level at the end of this step.
    """
    past, now, after = (torch.log(level.alpha / level.sigma) for level in (previous, start, end))
    share = (after - now) / (2 * (now - past))
    return clean + torch.where(end.sigma > 0, share, 0.0) * (clean - previous_clean)


def progressive_target(noisy: torch.Tensor, reached: torch.Tensor, start: NoiseLevel, end: NoiseLevel) -> torch.Tensor:
    """Return the x with which one DDIM step from z_t arrives where several steps of the teacher did.

    Salimans and Ho 2022, algorithm 2: (z_s - (sigma_s / sigma_t) z_t) / (alpha_s - (sigma_s / sigma_t) alpha_t).

    Args:
        noisy: Noisy latents z_t, [B, ...].
        reached: Latents z_s that the teacher reaches.
        start: Level of t.
        end: Level of s.
    """
    ratio = end.sigma / start.sigma
    return (reached - ratio * noisy) / (end.alpha - ratio * start.alpha)


def truncated_snr(level: NoiseLevel) -> torch.Tensor:
    """Return max(alpha^2 / sigma^2, 1), the weight of an error of x (Salimans and Ho 2022, equation 9)."""
    return (level.alpha / level.sigma).square().clamp(min=1)


def boundary_scalings(timesteps: torch.Tensor, axes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return c_skip and c_out [B, 1, ...] of f(z, t) = c_skip z + c_out x, so that f is z at t = 0.

    Luo et al. 2023, equation 9, with the constants of diffusers' LCMScheduler. ``timesteps`` are [B], and the result
    has ``axes`` axes.
    """
    scaled = (timesteps.double() * _TIMESTEP_SCALING).reshape(-1, *[1] * (axes - 1))
    total = scaled.square() + _DATA_DEVIATION**2
    return (_DATA_DEVIATION**2 / total).float(), (scaled / total.sqrt()).float()


def pseudo_huber(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return sqrt(|a - b|^2 + c^2) - c of each example, averaged, with c = 0.00054 sqrt(d) for d values.

    Outliers count less than in a squared error (Song and Dhariwal 2024, section 3.3).
    """
    difference = (predicted - target).flatten(1)
    constant = 0.00054 * math.sqrt(difference.shape[1])
    return ((difference.square().sum(1) + constant**2).sqrt() - constant).mean()


Network = Callable[..., tuple[torch.Tensor, ...]]
"""A module of diffusers, or a function that is called like one."""


@dataclass(frozen=True)
class CleanBatch:
    """Clean latents [B, ...], and hidden states of their captions [B, tokens, width], if any."""

    clean: torch.Tensor
    text: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.clean)


@dataclass(frozen=True)
class GuidedDenoiser:
    """A network of diffusers and its prediction type.

    With ``empty`` [1, tokens, width], the states of the empty prompt, it applies classifier-free ``guidance``.
    """

    network: nn.Module
    prediction_type: PredictionType
    schedule: NoiseSchedule
    empty: torch.Tensor | None = None
    guidance: float = 1.0

    def clean(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: CleanBatch, network: Network | None = None
    ) -> torch.Tensor:
        """Predict x [B, ...] in float32.

        Args:
            noisy: Noisy latents, [B, ...].
            timesteps: Timesteps, [B].
            batch: Captions.
            network: Network that replaces its own, such as a wrapper of it.
        """
        network = self.network if network is None else network
        level = self.schedule.levels(timesteps, noisy.ndim)
        if self.empty is None:
            options = {} if batch.text is None else {TEXT: batch.text}
            output = network(noisy, timesteps, return_dict=False, **options)[0].float()
            return predicted_clean(self.prediction_type, output, noisy, level)
        # One call computes the predictions with the prompt and with the empty one.
        assert batch.text is not None
        options = {TEXT: torch.cat([batch.text, self.empty.to(batch.text).expand_as(batch.text)])}
        doubled = torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps])
        conditional, unconditional = network(*doubled, return_dict=False, **options)[0].float().chunk(2)
        guided = apply_guidance(conditional, unconditional, self.guidance)
        return predicted_clean(self.prediction_type, guided, noisy, level)


def _sample_timesteps(batch: CleanBatch, timesteps: torch.Tensor) -> torch.Tensor:
    """Return uniformly random timesteps [B], on the batch's device."""
    return timesteps[torch.randint(len(timesteps), (len(batch),))].to(batch.clean.device)


def _noised(batch: CleanBatch, level: NoiseLevel) -> torch.Tensor:
    # The noise comes from the CPU's generator on every device.
    return add_noise(batch.clean, torch.randn(batch.clean.shape).to(batch.clean.device), level)


@dataclass(frozen=True)
class GuidanceLoss:
    """Loss of a student that predicts the guided teacher's x at every timestep (Meng et al. 2023, section 3.1).

    Other losses have their own ``timesteps`` at which the student is trained, and their own ``target``.
    """

    teacher: GuidedDenoiser
    student: GuidedDenoiser

    @property
    def timesteps(self) -> torch.Tensor:
        """Return the timesteps of the whole schedule."""
        return torch.arange(len(self.teacher.schedule))

    def target(self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: CleanBatch) -> torch.Tensor:
        """Return the x [B, ...] that the teacher predicts."""
        return self.teacher.clean(noisy, timesteps, batch)

    def loss(self, network: nn.Module, batch: CleanBatch) -> torch.Tensor:
        """Return the error of x, weighted by the truncated signal-to-noise ratio."""
        timesteps = _sample_timesteps(batch, self.timesteps)
        level = self.student.schedule.levels(timesteps, batch.clean.ndim)
        noisy = _noised(batch, level)
        with torch.no_grad():
            target = self.target(noisy, timesteps, batch)
        predicted = self.student.clean(noisy, timesteps, batch, network)
        return (truncated_snr(level) * (predicted - target).square()).mean()


@dataclass(frozen=True)
class ProgressiveLoss(GuidanceLoss):
    """Loss of a student whose DDIM steps, ``steps`` in all, each replace ``merged`` steps of the teacher.

    Two, as in Salimans and Ho 2022, algorithm 2, or more. With ``second_order`` the teacher takes DPM-Solver++ steps.
    """

    steps: int
    merged: int = 2
    second_order: bool = False

    @property
    def timesteps(self) -> torch.Tensor:
        """Timesteps of the student: those of diffusers' DDIMScheduler with timestep_spacing "trailing"."""
        num_timesteps = len(self.student.schedule)
        return torch.tensor([round(num_timesteps * step / self.steps) - 1 for step in range(self.steps, 0, -1)])

    def target(self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: CleanBatch) -> torch.Tensor:
        """Return the x [B, ...] with which one step from ``noisy`` arrives where the teacher's steps do."""
        schedule, axes = self.teacher.schedule, noisy.ndim
        stride = len(schedule) // self.steps
        points = [timesteps - stride * step // self.merged for step in range(self.merged + 1)]
        levels = [schedule.levels(point, axes) for point in points]
        reached, predictions = noisy, list[torch.Tensor]()
        for index, (start, end) in enumerate(pairwise(levels)):
            predictions.append(self.teacher.clean(reached, points[index], batch))
            clean = predictions[-1]
            if self.second_order and index:
                clean = extrapolate(clean, predictions[-2], levels[index - 1], start, end)
            reached = ddim_step(clean, reached, start, end)
        return progressive_target(noisy, reached, levels[0], levels[-1])


class AveragedNetwork(nn.Module):
    """A network with a moving average of its weights, in buffers so that a training checkpoint contains it."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        super().__init__()
        self.network, self.decay = network, decay
        for index, weight in enumerate(network.parameters()):
            self.register_buffer(f"average_{index}", weight.detach().clone())

    def forward(self, *args: object, **options: object) -> object:
        """Return the network's output."""
        return self.network(*args, **options)

    def average(self, *args: object, **options: object) -> tuple[torch.Tensor, ...]:
        """Return the network's output with the averaged weights."""
        output: tuple[torch.Tensor, ...] = torch.func.functional_call(self.network, self._averages(), args, options)
        return output

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the weights, in place."""
        for name, average in self._averages().items():
            average.lerp_(self.network.get_parameter(name).detach(), 1 - self.decay)

    @torch.no_grad()
    def apply_average(self) -> None:
        """Replace the network's weights with their average, in place."""
        for name, average in self._averages().items():
            self.network.get_parameter(name).copy_(average)

    def _averages(self) -> dict[str, torch.Tensor]:
        names = (name for name, _ in self.network.named_parameters())
        return {name: self.get_buffer(f"average_{index}") for index, name in enumerate(names)}


@dataclass(frozen=True)
class ConsistencyLoss(GuidanceLoss):
    """Loss of a student that predicts the same end from neighbours on a trajectory (Luo et al. 2023, algorithm 1).

    The trajectory is that of the teacher's DDIM in ``steps`` steps. The prediction from the neighbour nearer to the end
    is the target and uses the weights of ``averaged``.
    """

    steps: int
    averaged: AveragedNetwork

    @property
    def timesteps(self) -> torch.Tensor:
        """Timesteps of diffusers' LCMScheduler with as many original_inference_steps."""
        stride = len(self.student.schedule) // self.steps
        return torch.arange(1, self.steps + 1) * stride - 1

    def predict_end(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: CleanBatch, network: Network
    ) -> torch.Tensor:
        """Return f(z, t) = c_skip z + c_out x, which is z itself at timestep 0.

        Args:
            noisy: Noisy latents z, [B, ...].
            timesteps: Timesteps, [B].
            batch: Captions.
            network: Network of the student, or with its averaged weights.
        """
        skip, out = boundary_scalings(timesteps, noisy.ndim)
        return skip * noisy + out * self.student.clean(noisy, timesteps, batch, network)

    def loss(self, network: nn.Module, batch: CleanBatch) -> torch.Tensor:
        """Return the distance of the two predicted ends."""
        schedule, axes = self.teacher.schedule, batch.clean.ndim
        timesteps = _sample_timesteps(batch, self.timesteps)
        nearer = (timesteps - len(schedule) // self.steps).clamp(min=0)
        start, end = (schedule.levels(times, axes) for times in (timesteps, nearer))
        noisy = _noised(batch, start)
        with torch.no_grad():
            stepped = ddim_step(self.teacher.clean(noisy, timesteps, batch), noisy, start, end)
            target = self.predict_end(stepped, nearer, batch, self.averaged.average)
        return pseudo_huber(self.predict_end(noisy, timesteps, batch, network), target)
