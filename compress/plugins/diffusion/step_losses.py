"""Losses of denoisers that learn to sample in fewer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from compress.plugins.diffusion.noise_prediction import (
    NoiseLevel,
    NoiseSchedule,
    PredictionType,
    add_noise,
    apply_guidance,
    boundary_scalings,
    ddim_step,
    extrapolate,
    guidance_embedding,
    predicted_clean,
    progressive_target,
    pseudo_huber,
    truncated_snr,
)
from compress.plugins.diffusion.sampler import CONDITION, TEXT

Network = Callable[..., tuple[torch.Tensor, ...]]
"""A module of diffusers, or a function that is called like one."""


@dataclass(frozen=True)
class CleanBatch:
    """Clean latents [B, ...], hidden states of their captions [B, tokens, width] and guidance scales [B], if any."""

    clean: torch.Tensor
    text: torch.Tensor | None = None
    scales: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.clean)


@dataclass(frozen=True)
class GuidedDenoiser:
    """A network of diffusers, its prediction type, and the width of its guidance embedding, or 0.

    With ``empty`` [1, tokens, width], the states of the empty prompt, it applies classifier-free guidance.
    """

    network: nn.Module
    prediction_type: PredictionType
    schedule: NoiseSchedule
    condition_width: int = 0
    empty: torch.Tensor | None = None

    def clean(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, batch: CleanBatch, network: Network | None = None
    ) -> torch.Tensor:
        """Predict x [B, ...] in float32.

        Args:
            noisy: Noisy latents, [B, ...].
            timesteps: Timesteps, [B].
            batch: Captions and guidance scales.
            network: Network that replaces its own, such as a wrapper of it.
        """
        network = self.network if network is None else network
        level = self.schedule.levels(timesteps, noisy.ndim)
        options: dict[str, torch.Tensor] = {}
        if self.condition_width:
            assert batch.scales is not None
            options[CONDITION] = guidance_embedding(batch.scales, self.condition_width)
        if self.empty is None:
            if batch.text is not None:
                options[TEXT] = batch.text
            output = network(noisy, timesteps, return_dict=False, **options)[0].float()
            return predicted_clean(self.prediction_type, output, noisy, level)
        # One call computes the predictions with the prompt and with the empty one.
        assert batch.text is not None and batch.scales is not None
        options[TEXT] = torch.cat([batch.text, self.empty.to(batch.text).expand_as(batch.text)])
        doubled = torch.cat([noisy, noisy]), torch.cat([timesteps, timesteps])
        conditional, unconditional = network(*doubled, return_dict=False, **options)[0].float().chunk(2)
        scales = batch.scales.reshape(-1, *[1] * (noisy.ndim - 1))
        return predicted_clean(self.prediction_type, apply_guidance(conditional, unconditional, scales), noisy, level)


def _sample_timesteps(batch: CleanBatch, timesteps: torch.Tensor) -> torch.Tensor:
    """Return uniformly random timesteps [B], on the batch's device."""
    return timesteps[torch.randint(len(timesteps), (len(batch),))].to(batch.clean.device)


def _noised(batch: CleanBatch, level: NoiseLevel) -> torch.Tensor:
    # The noise comes from the CPU's generator on every device.
    return add_noise(batch.clean, torch.randn(batch.clean.shape).to(batch.clean.device), level)


def _weighted_error(predicted: torch.Tensor, target: torch.Tensor, level: NoiseLevel) -> torch.Tensor:
    return (truncated_snr(level) * (predicted - target).square()).mean()


@dataclass(frozen=True)
class GuidanceLoss:
    """Loss of a student that predicts the guided teacher's x at every timestep (Meng et al. 2023, section 3.1)."""

    teacher: GuidedDenoiser
    student: GuidedDenoiser

    def loss(self, network: nn.Module, batch: CleanBatch) -> torch.Tensor:
        """Return the error of x, weighted by the truncated signal-to-noise ratio."""
        schedule = self.teacher.schedule
        timesteps = _sample_timesteps(batch, torch.arange(len(schedule)))
        level = schedule.levels(timesteps, batch.clean.ndim)
        noisy = _noised(batch, level)
        with torch.no_grad():
            target = self.teacher.clean(noisy, timesteps, batch)
        return _weighted_error(self.student.clean(noisy, timesteps, batch, network), target, level)


@dataclass(frozen=True)
class ProgressiveLoss:
    """Loss of a student whose DDIM steps, ``steps`` in all, each replace ``merged`` steps of the teacher.

    Two, as in Salimans and Ho 2022, algorithm 2, or more. With ``second_order`` the teacher takes DPM-Solver++ steps.
    """

    teacher: GuidedDenoiser
    student: GuidedDenoiser
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

    def loss(self, network: nn.Module, batch: CleanBatch) -> torch.Tensor:
        """Return the error of x, weighted by the truncated signal-to-noise ratio."""
        timesteps = _sample_timesteps(batch, self.timesteps)
        level = self.student.schedule.levels(timesteps, batch.clean.ndim)
        noisy = _noised(batch, level)
        with torch.no_grad():
            target = self.target(noisy, timesteps, batch)
        return _weighted_error(self.student.clean(noisy, timesteps, batch, network), target, level)


class AveragedNetwork(nn.Module):
    """A network with a moving average of its weights, in buffers so that a training checkpoint contains it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for index, weight in enumerate(network.parameters()):
            self.register_buffer(f"average_{index}", weight.detach().clone())

    def forward(self, *args: object, **options: object) -> object:
        """Return the network's output."""
        return self.network(*args, **options)

    def average(self, *args: object, **options: object) -> tuple[torch.Tensor, ...]:
        """Return the network's output with the averaged weights."""
        output: tuple[torch.Tensor, ...] = torch.func.functional_call(
            self.network, dict(self._averages()), args, options
        )
        return output

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """Move the average towards the weights, in place."""
        weights: Mapping[str, nn.Parameter] = dict(self.network.named_parameters())
        for name, average in self._averages():
            average.lerp_(weights[name].detach(), 1 - decay)

    @torch.no_grad()
    def apply_average(self) -> None:
        """Replace the network's weights with their average, in place."""
        weights = dict(self.network.named_parameters())
        for name, average in self._averages():
            weights[name].copy_(average)

    def _averages(self) -> list[tuple[str, torch.Tensor]]:
        names = (name for name, _ in self.network.named_parameters())
        return [(name, self.get_buffer(f"average_{index}")) for index, name in enumerate(names)]


@dataclass(frozen=True)
class ConsistencyLoss:
    """Loss of a student that predicts the same end from neighbours on a trajectory (Luo et al. 2023, algorithm 1).

    The trajectory is that of the teacher's DDIM in ``steps`` steps. The prediction from the neighbour nearer to the end
    is the target and uses the weights of ``averaged``.
    """

    teacher: GuidedDenoiser
    student: GuidedDenoiser
    steps: int
    averaged: AveragedNetwork
    scaling: float
    huber: bool

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
            batch: Captions and guidance scales.
            network: Network of the student, or with its averaged weights.
        """
        skip, out = boundary_scalings(timesteps, noisy.ndim, self.scaling)
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
        predicted = self.predict_end(noisy, timesteps, batch, network)
        return pseudo_huber(predicted, target) if self.huber else (predicted - target).square().mean()
